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

// How torch's own product runs on this CPU: at about the kernels' rate; at half of it or less, because it uses half of
// each register or has no instruction for the type; or on a unit of its own, faster than any vector.
enum class Stock { kUsual, kHalved, kEmulated, kMatrixUnit };

// What the choice may depend on.
struct Problem {
  bool cuda = false;
  bool open = false;       // as far as the host knows; an unknown gate counts as open
  bool same_dtype = true;  // the weight already has the compute type
  bool fusable = false;    // the fused kernels know its types and layout
  bool narrow = false;     // 16 bits
  Stock stock = Stock::kUsual;
  bool wide = false;      // the CPU's kernels have sixteen lanes
  bool pairs = false;     // and multiply bf16 in pairs
  long long places = 0;   // of a convolution's kernel, kH * kW; a linear layer has none
  long long rows = 0;     // M: rows of the product
  long long outputs = 0;  // N
  long long inputs = 0;   // K
};

// Up to this many rows W_t is built on its way to the tensor cores. Predicted, not yet measured: at N = K = 4096 with W
// in bf16 and Delta in fp32, 100 MB are read once (23 us at 4.3 TB/s); a rebuild moves 134 MB (31 us) and its product
// reads W_t again (8 us) and starts another kernel. Tiles of 64 rows read W and Delta from L2 once each: at an
// assumed 5.5 TB/s four of them take 73 us, and the rebuild, whose product still waits for memory, 43 us; two take 37.
constexpr long long kMostFusedRows = 128;

// On the CPU: benchmarks/paths.py measures both paths by force. Its times over the stock op on merged weights follow as
// fused (rebuilt); two cores, torch 2.15; "AVX2" on Zen 3, "AVX-512" on Zen 5. Rows are the pixels of a convolution's
// result.
//
// Up to this many rows, and from this many weights on: below, they stay in the caches, and to rebuild them costs
// little. AVX2, fp32: 768 -> 3072 with 8, 64 and 256 rows 0.90 (1.93), 0.86 (1.33), 0.83 (1.07); 1024 -> 1024 with 256
// rows 1.03 (1.11); 384 -> 384 with 8 and 256 rows 1.2 (1.2), 1.2 (1.1); convolutions, one image: 512 -> 512, 3x3 on
// 7x7 0.76 (1.40); 2048 -> 512 on 7x7 0.91 (1.39); 256 -> 256, 3x3 on 14x14 1.08 (1.19); 1024 -> 256 on 14x14 1.15
// (1.11). AVX-512: 512 -> 512, 3x3 on 7x7 0.98 (1.74); 256 -> 1024 and 1024 -> 256 on 14x14 0.99 (1.12), 1.05 (1.19).
constexpr long long kMostCpuRows = 256, kLeastCpuWeights = 3 << 17, kLeastWideWeights = 1 << 18;

// Twice as many for layers whose weights are large. AVX2, eight images: 512 -> 512, 3x3 on 7x7 0.94 (1.10); linear
// 4096 -> 4096 and 768 -> 3072 with 512 rows 0.96 (1.08), 0.86 (1.00), with 768 0.98 (0.97), 0.99 (1.04); 2048 -> 512
// on 7x7 1.24 (1.09). AVX-512, eight images on 7x7: 512 -> 2048 1.07 (1.18), 2048 -> 512 1.14 (1.19).
constexpr long long kMostCpuRowsOfLarge = 512, kLargeCpuWeights = 1 << 21, kLargeWideWeights = 1 << 20;

// Under a kernel of several places a pixel is packed once for each, which sixteen lanes leave less time for: in fp32 no
// more rows of large layers than of others. AVX-512, one image, 256 -> 256, 3x3 on 7x7, 10x10, 14x14 and 16x16 0.52
// (1.20), 0.87 (1.18), 0.94 (1.16), 1.03 (1.13), channels_last 0.54 (1.22), 0.77 (1.03), 0.93 (1.02), 1.09 (1.02); 512
// -> 512, 3x3 on 16x16 1.00 (1.19), channels_last 0.94 (1.18); on 7x7, eight images, in five runs 1.04-1.17
// (1.12-1.15), channels_last 1.07-1.29 (1.12-1.16). In pairs somewhat more: 512 -> 512, 3x3, eight images on 7x7 1.12
// (1.20), channels_last 1.13 (1.22), on 14x14 / 2 1.09 (1.19), 1.03 (1.20); two images on 16x16 1.16 (1.13), 1.14
// (1.14).
constexpr long long kMostPlacesOfMoreRows = 1, kMostPairedRowsOfPlaces = 400;

// A panel is 16 or 32 outputs wide and one thread's: fewer outputs leave most of it idle. AVX-512, 768 -> 1 with 64 and
// 1576 rows: fp32 6.9 (2.9), 6.9 (1.3); bf16 1.5 (1.4), 8 (1.4).
constexpr long long kLeastCpuOutputs = 16;

// In pairs of bf16 torch is as fast, and the bytes decide: few rows are fused whatever the weights, more of them where
// weights are large. AVX-512, W in bf16 and Delta in fp32: 64 -> 64, 768 -> 768, 4096 -> 4096 with 64 rows 0.73 (1.36),
// 1.38 (1.41), 1.22 (1.91); with 256 rows 768 -> 768 and 1024 -> 1024 1.23 (1.17), 1.17 (1.24); one image of 256 ->
// 1024 on 14x14 0.95 (1.20), eight images of 1024 -> 2048 / 2 on 14x14 0.98 (1.22).
constexpr long long kMostPairedRows = 64, kLeastPairedWeights = 1 << 18, kLargePairedWeights = 1 << 21;

// On a matrix unit, and with instructions for 16 bits that the kernels have not, only what memory decides: up to about
// this many rows. Not measured.
constexpr long long kMostUnitRows = 32;

// Where torch emulates bf16, the kernels win from about this much work on. AVX2: 384 x 384 with 8 rows 0.7 (1.3), 768
// -> 3072 with 64 and 1576 rows 0.17 (1.04), 0.15 (0.99); 64 -> 64, 3x3 on 56x56 0.04 (1.00), channels_last 0.35
// (0.99). AVX-512 held off from its bf16: 384 x 384 with 8 rows 0.8 (1.4), 768 -> 3072 with 64 and 1576 rows 0.47
// (1.20), 0.40 (1.02). Under four rows torch has a product of its own for them: AVX2, 384 x 384 with one 4.0 (2.3).
constexpr long long kLeastEmulatedWork = 1 << 20, kLeastEmulatedRows = 4;

// Where its fp32 product has half the rate, from this many weights and this much work on. AVX-512, 1 and 1576 rows:
// 768 -> 768 0.79 (1.04), 0.57 (1.02); 768 -> 3072 0.79 (1.75), 0.53 (1.03); 4096 -> 4096 1.03 (2.39), 0.59 (1.17);
// 384 -> 384 with 1, 4 and 1576 rows 1.36 (1.39), 0.91 (1.18), 0.68 (1.04); 128 -> 128 with 1576 rows 1.26 (1.11).
constexpr long long kLeastHalvedWeights = 1 << 17, kLeastHalvedWork = 1 << 19;

constexpr bool worth_fusing(const Problem& problem) {
  if (problem.cuda) return problem.rows <= kMostFusedRows;
  if (problem.outputs < kLeastCpuOutputs) return false;
  const long long weights = problem.outputs * problem.inputs, work = problem.rows * weights;
  if (problem.stock == Stock::kEmulated && problem.rows >= kLeastEmulatedRows) return work >= kLeastEmulatedWork;
  if (problem.stock == Stock::kHalved && weights >= kLeastHalvedWeights && work >= kLeastHalvedWork) return true;
  const bool unmatched = problem.narrow && problem.stock == Stock::kUsual && !problem.pairs;
  if (problem.stock == Stock::kMatrixUnit || unmatched) {
    return problem.rows <= kMostUnitRows && weights >= kLeastCpuWeights;
  }
  if (problem.pairs && problem.rows <= kMostPairedRows) return true;
  const long long large = problem.pairs ? kLargePairedWeights : problem.wide ? kLargeWideWeights : kLargeCpuWeights;
  const long long least = problem.pairs ? kLeastPairedWeights : problem.wide ? kLeastWideWeights : kLeastCpuWeights;
  if (weights < least) return false;
  if (weights < large) return problem.rows <= kMostCpuRows;
  if (!problem.wide || problem.places <= kMostPlacesOfMoreRows) return problem.rows <= kMostCpuRowsOfLarge;
  return problem.rows <= (problem.pairs ? kMostPairedRowsOfPlaces : kMostCpuRows);
}

// kStock: the layer's own weight through torch's op; a closed gate costs the base layer.
// kFused: W_t in registers and L1 alone (csrc/cuda/linear.cuh, csrc/cpu/few_rows.cpp, csrc/cpu/tiles.cpp).
// kRebuild: W_t (or the cast weight) into the workspace, then torch's op. A gate that the host knows to be closed never
// takes the fused kernels: its result is torch's to the bit, cast or not.
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
    throw std::runtime_error(
        "path: fused is forced, but this layer cannot be: its types or layout, gradients, or no rows");
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
    throw std::runtime_error(
        "path: fused is forced, but this gradient cannot be: its types or layout, or a gradient of W");
  }
  return Path::kFused;
}

}  // namespace taps
