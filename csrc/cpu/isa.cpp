// Chooses the instruction set of the CPU lanes once, from what the machine has.
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>

namespace taps::cpu {

extern const Lanes lanes_baseline;
extern const Encoders encoders_baseline;
extern const FewRows few_rows_baseline;
extern const Packs packs_baseline;
extern const Tiles tiles_baseline;
#ifdef TAPS_HAVE_AVX2
extern const Lanes lanes_avx2;
extern const Encoders encoders_avx2;
extern const FewRows few_rows_avx2;
extern const Packs packs_avx2;
extern const Tiles tiles_avx2;
#endif
#ifdef TAPS_HAVE_AVX512
extern const Lanes lanes_avx512;
extern const Encoders encoders_avx512;
extern const FewRows few_rows_avx512;
extern const Packs packs_avx512;
extern const Tiles tiles_avx512;
#endif
#ifdef TAPS_HAVE_AVX512BF16
extern const FewRows few_rows_avx512bf16;
extern const Packs packs_avx512bf16;
extern const Tiles tiles_avx512bf16;
#endif

namespace {

#ifdef TAPS_HAVE_AVX512
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
}
#endif

struct Set {
  const char* name;
  const Lanes* lanes;
  const Encoders* encoders;
  const FewRows* few_rows;
  const Packs* packs;
  const Tiles* tiles;
  bool runs_here;
};

// Best first.
const std::vector<Set>& sets() {
  static const std::vector<Set> all = {
#ifdef TAPS_HAVE_AVX512BF16
      {"avx512bf16", &lanes_avx512, &encoders_avx512, &few_rows_avx512bf16, &packs_avx512bf16, &tiles_avx512bf16,
       runs_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef TAPS_HAVE_AVX512
      {"avx512", &lanes_avx512, &encoders_avx512, &few_rows_avx512, &packs_avx512, &tiles_avx512, runs_avx512()},
#endif
#ifdef TAPS_HAVE_AVX2
      {"avx2", &lanes_avx2, &encoders_avx2, &few_rows_avx2, &packs_avx2, &tiles_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")},
#endif
      {"baseline", &lanes_baseline, &encoders_baseline, &few_rows_baseline, &packs_baseline, &tiles_baseline, true},
  };
  return all;
}

const Set* best() {
  for (const Set& set : sets()) {
    if (set.runs_here) return &set;
  }
  return &sets().back();
}

std::atomic<const Set*>& chosen() {
  static std::atomic<const Set*> set{best()};
  return set;
}

}  // namespace

#if defined(__x86_64__)

bool has_matrix_unit() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBFloat16 = 1u << 22;
  static const bool has = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBFloat16) != 0;
  return has;
}

bool emulates_bfloat16() {
  static const bool emulates = !has_matrix_unit() && !__builtin_cpu_supports("avx512bf16");
  return emulates;
}

bool halves_matrix_products() {
  static const bool halves = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
  return halves;
}

#else  // not measured

bool has_matrix_unit() { return false; }
bool emulates_bfloat16() { return false; }
bool halves_matrix_products() { return false; }

#endif

const Lanes& lanes() { return *chosen().load(std::memory_order_relaxed)->lanes; }

const Encoders& encoders() { return *chosen().load(std::memory_order_relaxed)->encoders; }

FewRows few_rows() { return *chosen().load(std::memory_order_relaxed)->few_rows; }

const Packs& packs() { return *chosen().load(std::memory_order_relaxed)->packs; }

const Tiles& tiles() { return *chosen().load(std::memory_order_relaxed)->tiles; }

std::string isa() { return chosen().load(std::memory_order_relaxed)->name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Set& set : sets()) {
    if (set.runs_here) names.push_back(set.name);
  }
  return names;
}

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Set& set : sets()) names.push_back(set.name);
  return names;
}

void force_isa(const std::string& name) {
  if (name.empty()) {
    chosen() = best();
    return;
  }
  std::string known;
  for (const Set& set : sets()) {
    if (!set.runs_here) continue;
    if (name == set.name) {
      chosen() = &set;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + set.name;
  }
  throw std::runtime_error("name: expected one of " + known + ", got " + name);
}

}  // namespace taps::cpu
