// The loops that make a packed Delta (layouts: docs/format.md, meaning: taps_ext/ops/codec.py). Compiled once per
// instruction set with TAPS_ISA naming it, without fused multiply-add: every set gives the same bits.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/word.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace taps::cpu {
namespace {

constexpr int kGroup = static_cast<int>(kScaleGroup);

inline uint32_t magnitude(float value) { return as<uint32_t>(value) & 0x7fffffffu; }

// The sum of a power of two of values by halves: each of the first half and its partner in the second, until one is
// left.
template <int kCount>
inline double folded(double* values) {
  for (int width = kCount / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) values[j] += values[j + width];
  }
  return values[0];
}

// --- int8, int4 -----------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX2__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
using Doubles = double __attribute__((vector_size(kWide * sizeof(double))));
using Singles = float __attribute__((vector_size(kWide * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kWide * sizeof(uint32_t))));
using Ints = int32_t __attribute__((vector_size(kWide * sizeof(int32_t))));
using Bytes = int8_t __attribute__((vector_size(kWide)));
constexpr int kVectors = kGroup / kWide;

struct Group {
  Doubles part[kVectors];
};

constexpr int kScales = 8;  // seven, and one that fills vectors
constexpr double kShrink[kScales] = {1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.7};

// Scales to try, and their inverses: of zero zero.
struct Scales {
  alignas(64) uint32_t bits[kScales];  // of the float that a bfloat16 is
  alignas(64) double step[kScales];
  alignas(64) double steps[kScales];
};

// The nearest bfloat16 of the first shares of peak / kMost, as torch converts: to the nearest float first. The very
// first is one up where the peak is more than half a step beyond its last code.
template <int kMost, int kCount>
inline Scales scales_of(double peak) {
  Scales scales;
  for (int k = 0; k < kCount; k += kWide) {
    Doubles share;
    std::memcpy(&share, kShrink + k, sizeof share);
    Words bits = as<Words>(__builtin_convertvector(share * peak / static_cast<double>(kMost), Singles));
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    if (k == 0) {
      const float first = as<float>(static_cast<uint32_t>(bits[0]));
      bits[0] += first * (kMost + 0.5) < peak ? 0x10000u : 0u;
    }
    const Doubles step = __builtin_convertvector(as<Singles>(bits), Doubles), inverse = 1.0 / step;
    const Doubles steps = step > 0.0 ? inverse : Doubles{};
    std::memcpy(scales.bits + k, &bits, sizeof bits);
    std::memcpy(scales.step + k, &step, sizeof step);
    std::memcpy(scales.steps + k, &steps, sizeof steps);
  }
  return scales;
}

// The codes of a part under a scale, as whole numbers: the nearest, of two the even one.
template <int kMost>
inline Doubles codes_of(Doubles part, double steps) {
  const Doubles most = Doubles{} + kMost, least = Doubles{} - kMost, code = part * steps;
#if defined(__AVX512F__)
  return _mm512_roundscale_pd(_mm512_max_pd(_mm512_min_pd(code, most), least), _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return _mm256_round_pd(_mm256_max_pd(_mm256_min_pd(code, most), least),
                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to whole
  const Doubles upper = code < most ? code : most, kept = upper > least ? upper : least;
  return (kept + kRound) - kRound;
#endif
}

// The sum of a vector's elements by halves.
inline double total(Doubles wide) {
#if defined(__AVX512F__)
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(wide), _mm512_extractf64x4_pd(wide, 1));
#elif defined(__AVX2__)
  const __m256d four = wide;
#endif
#if defined(__AVX2__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return two[0] + two[1];
#else
  return wide[0] + wide[1];
#endif
}

// What a group loses under a scale, squared.
template <int kMost>
inline double loss_of(const Group& group, double step, double steps) {
  Doubles lost[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const Doubles rest = group.part[v] - codes_of<kMost>(group.part[v], steps) * step;
    lost[v] = rest * rest;
  }
  for (int width = kVectors / 2; width > 0; width /= 2) {
    for (int v = 0; v < width; ++v) lost[v] += lost[v + width];
  }
  return total(lost[0]);
}

// Where the least of kCount values is, the first of equal ones. Without a branch, which could not be predicted.
template <int kCount>
inline int first_least(const double* values) {
  double least = values[0];
  for (int k = 1; k < kCount; ++k) least = values[k] < least ? values[k] : least;
  unsigned found = 0;
  for (int k = 0; k < kCount; ++k) found |= static_cast<unsigned>(values[k] == least) << k;
  return __builtin_ctz(found);
}

// Of the first kFactors scales, under which the peak is the last code or a little beyond, the one that loses least.
template <int kMost, int kFactors>
inline uint16_t encode_group(const float* delta, double peak, int8_t* codes) {
  Group group;
  for (int v = 0; v < kVectors; ++v) {
    Singles part;
    std::memcpy(&part, delta + v * kWide, sizeof part);
    group.part[v] = __builtin_convertvector(part, Doubles);
  }
  const Scales scales = scales_of<kMost, kFactors == 1 ? 1 : kScales>(peak);
  int best = 0;
  if (kFactors > 1) {
    alignas(64) double losses[kFactors];
    for (int k = 0; k < kFactors; ++k) losses[k] = loss_of<kMost>(group, scales.step[k], scales.steps[k]);
    best = first_least<kFactors>(losses);
  }
  for (int v = 0; v < kVectors; ++v) {
    const Doubles code = codes_of<kMost>(group.part[v], scales.steps[best]);
    const Bytes made = __builtin_convertvector(__builtin_convertvector(code, Ints), Bytes);
    std::memcpy(codes + v * kWide, &made, sizeof made);
  }
  return static_cast<uint16_t>(scales.bits[best] >> 16);
}

bool encode_groups(const float* delta, int64_t n, Codec codec, void* codes, uint16_t* scales) {
  const uint32_t most = magnitude(0x1p120f * (codec == Codec::kInt8 ? 127.0f : 7.0f));
  bool held = true;
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t count = n - i < kGroup ? n - i : kGroup;
    float padded[kGroup] = {};
    const float* group = delta + i;
    if (count < kGroup) group = static_cast<float*>(std::memcpy(padded, group, static_cast<size_t>(count) * 4));
    uint32_t peak = 0;
    for (int j = 0; j < kGroup; ++j) peak = magnitude(group[j]) > peak ? magnitude(group[j]) : peak;
    if (peak > most) {  // Inf and NaN too
      held = false;
      continue;
    }
    int8_t code[kGroup];
    if (codec == Codec::kInt8) {
      scales[i / kGroup] = encode_group<127, 1>(group, as<float>(peak), code);
      std::memcpy(static_cast<int8_t*>(codes) + i, code, static_cast<size_t>(count));
    } else {
      scales[i / kGroup] = encode_group<7, 7>(group, as<float>(peak), code);
      uint16_t pairs[kGroup / 2];  // two codes each, the first in the lower byte
      uint8_t bytes[kGroup / 2];
      std::memcpy(pairs, code, sizeof pairs);
      for (int j = 0; j < kGroup / 2; ++j) bytes[j] = static_cast<uint8_t>((pairs[j] & 15) | (pairs[j] >> 4 & 240));
      std::memcpy(static_cast<uint8_t*>(codes) + i / 2, bytes, static_cast<size_t>((count + 1) / 2));
    }
  }
  return held;
}

// --- sign -----------------------------------------------------------------------------------------

double sum_of_magnitudes(const float* delta, int64_t n) {
  double sums[kDotSums] = {};
  int64_t i = 0;
  for (; i + kDotSums <= n; i += kDotSums) {
    for (int j = 0; j < kDotSums; ++j) sums[j] += as<float>(magnitude(delta[i + j]));
  }
  for (; i < n; ++i) sums[i % kDotSums] += as<float>(magnitude(delta[i]));
  return folded<kDotSums>(sums);
}

// Eight questions as a byte.
template <class Asked>
inline uint8_t byte_of(const float* values, const Asked& asked) {
  uint32_t byte = 0;
  for (uint32_t j = 0; j < 8; ++j) byte |= static_cast<uint32_t>(asked(values[j])) << j;
  return static_cast<uint8_t>(byte);
}

template <class Asked>
inline uint8_t rest_of(const float* values, int64_t n, const Asked& asked) {
  uint32_t byte = 0;
  for (int64_t j = 0; j < n; ++j) byte |= static_cast<uint32_t>(asked(values[j])) << j;
  return static_cast<uint8_t>(byte);
}

void signs(const float* delta, int64_t n, uint8_t* bits) {
  const auto negative = [](float value) { return value < 0.0f; };
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const uint16_t mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(delta + i), _mm512_setzero_ps(), _CMP_LT_OQ);
    std::memcpy(bits + i / 8, &mask, sizeof mask);
  }
#endif
  for (; i + 8 <= n; i += 8) bits[i / 8] = byte_of(delta + i, negative);
  if (i < n) bits[i / 8] = rest_of(delta + i, n - i, negative);
}

// --- bitmask --------------------------------------------------------------------------------------

int64_t count_from(const float* delta, int64_t n, Chosen chosen) {
  int64_t count = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = n - i < 4096 ? n : i + 4096;
    int32_t some = 0;
    for (; i < end; ++i) some += (as<uint32_t>(delta[i]) & chosen.mask) >= chosen.least;
    count += some;
  }
  return count;
}

// Sixteen values and a slot to spare: what is not chosen is written too, and written over.
int64_t choose(const float* delta, int64_t n, Chosen chosen, uint8_t* bits, float* values) {
  const auto asked = [chosen](float value) { return (as<uint32_t>(value) & chosen.mask) >= chosen.least; };
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(chosen.mask));
  const __m512i least = _mm512_set1_epi32(static_cast<int>(chosen.least));
  for (; i + 16 <= n; i += 16) {
    const __m512 some = _mm512_loadu_ps(delta + i);
    const uint16_t taken = _mm512_cmpge_epu32_mask(_mm512_and_epi32(_mm512_castps_si512(some), mask), least);
    std::memcpy(bits + i / 8, &taken, sizeof taken);
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(taken, some));
    count += __builtin_popcount(taken);
  }
#endif
  for (; i < n; i += 8) {
    const int64_t left = n - i < 8 ? n - i : 8;
    const uint8_t byte = left == 8 ? byte_of(delta + i, asked) : rest_of(delta + i, left, asked);
    bits[i / 8] = byte;
    for (int64_t j = 0; j < left; ++j) {
      values[count] = delta[i + j];
      count += (byte >> j) & 1;
    }
  }
  return count;
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const Encoders TAPS_CONCAT(encoders_, TAPS_ISA);
const Encoders TAPS_CONCAT(encoders_, TAPS_ISA) = {&encode_groups, &sum_of_magnitudes, &signs, &count_from, &choose};

}  // namespace taps::cpu
