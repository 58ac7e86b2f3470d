// Which path a gated layer takes. Every threshold, with the measurement behind it, lives here.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

namespace taps {

enum class Path { kStock, kRebuild, kFused };

inline const char* name_of(Path path) {
  return path == Path::kStock ? "stock" : path == Path::kFused ? "fused" : "rebuild";
}

// What the choice may depend on.
struct Problem {
  bool cuda = false;
  bool open = false;       // as far as the host knows; an unknown gate counts as open
  bool same_dtype = true;  // the weight already has the compute type
  bool fusable = false;    // the fused kernels know its types and layout
  bool emulated = false;   // torch's product of this type is written in plain C++ on this machine
  long long rows = 0;      // M: rows of the product
  long long outputs = 0;   // N
  long long inputs = 0;    // K
};

// Up to this many rows W_t is built on its way to the tensor cores. Predicted, not yet measured: at N = K = 4096 with W
// in bf16 and Delta in fp32, 100 MB are read once (23 us at 4.3 TB/s); a rebuild moves 134 MB (31 us) and its product
// reads W_t again (8 us) and starts another kernel. Tiles of 64 rows read W and Delta from L2 once each: at an
// assumed 5.5 TB/s four of them take 73 us, and the rebuild, whose product still waits for memory, 43 us; two take 37.
constexpr long long kMostFusedRows = 128;

// Up to this many rows of fp32 on the CPU, where W_t is built anew for every 32 of them (csrc/cpu/few_rows.cpp). Times
// over the stock op on merged weights, two AVX2 cores, fused (rebuild), from benchmarks/results/layers-cpu.json and by
// force: 4096 x 4096 with 1, 4 and 8 rows 1.6 (3.3), 0.5 (1.7), 0.6 (1.7); 1024 x 1024 with 32, 64 and 256 rows 0.9
// (1.4), 1.1 (1.4), 1.6 (1.2). As many in bf16 where torch has products of its own for it; where it emulates them there
// is no limit: 1024 x 1024 with 32, 256 and 1576 rows 0.3 (1.1), 0.2 (1.0), 0.3 (1.1).
constexpr long long kMostFewRows = 64;

// From this many weights on. Below, what is saved is less than what calling an operator costs over a plain rebuild
// (rebuild() in rebuild.h), the more so where caches are cold; the few calls that are operators in any case follow the
// same rule. Microseconds, fused (rebuilt), one row of fp32: 256 x 256 45 (42), cold 246 (171); 512 x 512 59 (73), cold
// 322 (326).
constexpr long long kLeastFewRowsWeights = 1 << 17;

constexpr bool worth_fusing(const Problem& problem) {
  if (problem.cuda) return problem.rows <= kMostFusedRows;
  return (problem.rows <= kMostFewRows || problem.emulated) && problem.outputs * problem.inputs >= kLeastFewRowsWeights;
}

// kStock: the layer's own weight through torch's op; a closed gate costs the base layer.
// kFused: W_t in registers alone (csrc/cuda/linear.cuh, csrc/cpu/few_rows.cpp).
// kRebuild: W_t (or the cast weight) into the workspace, then torch's op. On the CPU that costs 1-10 % over the merged
// op where rows are many. A gate that the host knows to be closed never takes the fused
// kernels: its result is torch's to the bit, cast or not.
constexpr Path choose(const Problem& problem) {
  if (!problem.open) return problem.same_dtype ? Path::kStock : Path::kRebuild;
  return problem.fusable && worth_fusing(problem) ? Path::kFused : Path::kRebuild;
}

// The weight gradient: kFused keeps G in registers, kRebuild has torch write it. Up to the same number of rows, for the
// same reason: with Delta in fp32 the fused kernel moves 8 bytes a weight, torch's product and what follows 12.
constexpr Path choose_gradient(const Problem& problem) {
  return problem.fusable && problem.rows <= kMostFusedRows ? Path::kFused : Path::kRebuild;
}

// --- for tests and profilers ---------------------------------------------------------------------

inline std::atomic<int>& forced_path() {
  static std::atomic<int> path{-1};
  return path;
}

inline void force_path(const std::string& name) {
  if (name.empty()) {
    forced_path() = -1;
  } else if (name == "stock") {
    forced_path() = static_cast<int>(Path::kStock);
  } else if (name == "rebuild") {
    forced_path() = static_cast<int>(Path::kRebuild);
  } else if (name == "fused") {
    forced_path() = static_cast<int>(Path::kFused);
  } else {
    throw std::runtime_error("path: expected stock, rebuild, fused or None, got " + name);
  }
}

// A forced path that cannot give the right answer is refused, not taken.
inline Path checked_path(const Problem& problem) {
  const int forced = forced_path().load(std::memory_order_relaxed);
  if (forced < 0) return choose(problem);
  if (forced == static_cast<int>(Path::kStock) && choose(problem) != Path::kStock) {
    throw std::runtime_error("path: stock is forced, but the gate is open or the weight needs a cast");
  }
  if (forced == static_cast<int>(Path::kFused) && !problem.fusable) {
    throw std::runtime_error("path: fused is forced, but the kernels do not know this layer's types or layout");
  }
  return static_cast<Path>(forced);
}

// The path that this thread's last product with W_t took, or -1: for profilers.
inline int& taken_path() {
  static thread_local int path = -1;
  return path;
}

inline Path chosen_path(const Problem& problem) {
  const Path path = checked_path(problem);
  taken_path() = static_cast<int>(path);
  return path;
}

inline Path chosen_gradient_path(const Problem& problem) {
  const int forced = forced_path().load(std::memory_order_relaxed);
  if (forced < 0) return choose_gradient(problem);
  if (forced != static_cast<int>(Path::kFused)) return Path::kRebuild;
  if (!problem.fusable) {
    throw std::runtime_error("path: fused is forced, but the kernels do not know this gradient's types or layout");
  }
  return Path::kFused;
}

}  // namespace taps
