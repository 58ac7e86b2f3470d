// Which path a gated layer takes: a pure function over a table of rules, each with a key into its evidence
// (choose_evidence.toml beside this file). docs/choose.md is generated from both.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace taps {

// kStock: the layer's own weight through torch's op; a closed gate costs the base layer.
// kFused: W_t in registers and L1 alone (csrc/cuda/linear.cuh, conv2d.cuh and depthwise.cuh, csrc/cpu/few_rows.cpp and
// tiles.cpp).
// kRebuild: W_t (or the cast weight) into the workspace, then torch's op.
enum class Path { kStock, kRebuild, kFused };

inline const char* name_of(Path path) {
  return path == Path::kStock ? "stock" : path == Path::kFused ? "fused" : "rebuild";
}

// How torch's own product runs on this CPU, beside the kernels: at about their rate; at half of it or less, because it
// uses half of each register or has no instruction for the type; on a unit of its own, faster than any vector; or in 16
// bits by instructions that the kernels have not (`choose` tells these from the usual).
enum class Stock : uint8_t { kUsual = 1, kHalved = 2, kEmulated = 4, kMatrixUnit = 8, kUnmatched = 16 };

// How the CPU's kernels multiply: fewer lanes than sixteen, sixteen, or sixteen with pairs of bf16.
enum class Width : uint8_t { kNarrow = 1, kWide = 2, kPairs = 4 };

// What the choice may depend on.
struct Problem {
  bool cuda = false;
  bool open = false;       // as far as the host knows; an unknown gate counts as open
  bool same_dtype = true;  // the weight already has the compute type
  bool fusable = false;    // the fused kernels know its types and layout
  bool depthwise = false;  // of a depthwise convolution: N are the channels, K the places of its kernel
  bool narrow = false;     // 16 bits
  Stock stock = Stock::kUsual;
  bool wide = false;      // the CPU's kernels have sixteen lanes
  bool pairs = false;     // and multiply bf16 in pairs
  long long places = 0;   // of a convolution's kernel, kH * kW; a linear layer has none
  long long rows = 0;     // M: rows of the product, or pixels of a convolution's result
  long long outputs = 0;  // N
  long long inputs = 0;   // K

  constexpr Stock torchs() const { return stock == Stock::kUsual && narrow && !pairs ? Stock::kUnmatched : stock; }
  constexpr Width width() const { return pairs ? Width::kPairs : wide ? Width::kWide : Width::kNarrow; }
};

// A measurement replaces a prediction, never the reverse.
enum class Mark : uint8_t { kMeasured, kPredicted };
// A product with W_t; the weight's gradient; either of a depthwise convolution, which has kernels of its own.
enum class Of : uint8_t { kProduct, kGradient, kDepthwise };

// A layer is fused where one of these fits: what kind of product it is, and within which bounds.
struct Rule {
  const char* key;  // of its evidence
  Mark mark;
  Of of;
  bool cuda;
  uint8_t stocks, widths;                                                                  // the sum of those it is for
  long long least_outputs, least_rows, most_rows, most_places, least_weights, least_work;  // work: rows * weights
  long long least_places = 0, most_inputs = std::numeric_limits<long long>::max();

  constexpr bool is_for(const Problem& p, Of what) const {
    if (of != (p.depthwise ? Of::kDepthwise : what) || cuda != p.cuda) return false;
    return cuda || ((stocks & static_cast<uint8_t>(p.torchs())) && (widths & static_cast<uint8_t>(p.width())));
  }
  constexpr bool holds(const Problem& p) const {
    const long long weights = p.outputs * p.inputs;
    return p.outputs >= least_outputs && p.rows >= least_rows && p.rows <= most_rows && p.places >= least_places &&
           p.places <= most_places && p.inputs <= most_inputs && weights >= least_weights &&
           p.rows * weights >= least_work;
  }
};

namespace rules {

constexpr long long kAll = std::numeric_limits<long long>::max();
constexpr auto kMeasured = Mark::kMeasured, kPredicted = Mark::kPredicted;
constexpr auto kProduct = Of::kProduct, kGradient = Of::kGradient, kDepthwise = Of::kDepthwise;
constexpr uint8_t kUsual = 1, kHalved = 2, kEmulated = 4, kUnit = 8, kOther = 16;  // as Stock
constexpr uint8_t kNarrow = 1, kWide = 2, kPairs = 4, kAny = 7;                    // as Width
constexpr bool kCpu = false, kCuda = true;

// The CPU's need sixteen outputs, a panel (evidence "outputs").
constexpr Rule kTable[] = {
    // evidence, mark, of, where, torch's product, width: outputs from, rows from, to, places to, weights from, work
    // from, and where there are such bounds places from, inputs to
    {"cuda", kPredicted, kProduct, kCuda, 0, 0, 0, 0, 64, 0, 0, 0},
    {"wide", kPredicted, kProduct, kCuda, 0, 0, 768, 65, 128, 0, 5 << 20, 0},
    {"shallow", kPredicted, kProduct, kCuda, 0, 0, 0, 0, 256, kAll, 0, 0, 1, 512},
    {"cuda", kPredicted, kGradient, kCuda, 0, 0, 0, 0, 64, kAll, 0, 0},
    {"depthwise", kPredicted, kDepthwise, kCuda, 0, 0, 0, 0, kAll, 9, 0, 0},
    {"depthwise", kPredicted, kDepthwise, kCuda, 0, 0, 0, 0, 2048, 49, 0, 0},
    {"moderate", kMeasured, kProduct, kCpu, kUsual, kNarrow, 16, 0, 256, kAll, 3 << 17, 0},
    {"large", kMeasured, kProduct, kCpu, kUsual, kNarrow, 16, 0, 512, kAll, 1 << 21, 0},
    {"moderate", kMeasured, kProduct, kCpu, kUsual | kHalved, kWide, 16, 0, 256, kAll, 1 << 18, 0},
    {"large", kMeasured, kProduct, kCpu, kUsual | kHalved, kWide, 16, 0, 512, 1, 1 << 20, 0},
    {"pairs", kMeasured, kProduct, kCpu, kUsual, kPairs, 16, 0, 64, kAll, 0, 0},
    {"pairs", kMeasured, kProduct, kCpu, kUsual, kPairs, 16, 0, 256, kAll, 1 << 18, 0},
    {"large", kMeasured, kProduct, kCpu, kUsual, kPairs, 16, 0, 512, 1, 1 << 21, 0},
    {"places", kMeasured, kProduct, kCpu, kUsual, kPairs, 16, 0, 400, kAll, 1 << 21, 0},
    {"halved", kMeasured, kProduct, kCpu, kHalved, kAny, 16, 0, kAll, kAll, 1 << 17, 1 << 19},
    {"emulated", kMeasured, kProduct, kCpu, kEmulated, kAny, 16, 4, kAll, kAll, 0, 1 << 20},
    {"emulated", kMeasured, kProduct, kCpu, kEmulated, kNarrow, 16, 0, 3, kAll, 3 << 17, 0},
    {"emulated", kMeasured, kProduct, kCpu, kEmulated, kWide, 16, 0, 3, kAll, 1 << 18, 0},
    {"unit", kPredicted, kProduct, kCpu, kUnit, kAny, 16, 0, 15, kAll, 3 << 17, 0},
    {"other", kPredicted, kProduct, kCpu, kOther, kAny, 16, 0, 32, kAll, 3 << 17, 0},
};

// Evidence "apart": so many rows of a task from so many weights on.
constexpr long long kMostApartRows = 8, kLeastApartWeights = 1 << 20;
constexpr long long kLeastOfOneRow = 1 << 18;

}  // namespace rules

constexpr bool worth_fusing(const Problem& problem, Of of = Of::kProduct) {
  for (const Rule& rule : rules::kTable) {
    if (rule.is_for(problem, of) && rule.holds(problem)) return true;
  }
  return false;
}

// Whether what worth_fusing says rests on a prediction.
constexpr bool is_predicted(const Problem& problem, Of of = Of::kProduct) {
  for (const Rule& rule : rules::kTable) {
    if (rule.mark == Mark::kPredicted && rule.is_for(problem, of)) return true;
  }
  return false;
}

// A gate that the host knows to be closed never takes the fused kernels: its result is torch's to the bit, cast or not.
constexpr Path choose(const Problem& problem) {
  if (!problem.open) return problem.same_dtype ? Path::kStock : Path::kRebuild;
  return problem.fusable && worth_fusing(problem) ? Path::kFused : Path::kRebuild;
}

// The weight gradient: kFused keeps G in registers, kRebuild has torch write it.
constexpr Path choose_gradient(const Problem& problem) {
  return problem.fusable && worth_fusing(problem, Of::kGradient) ? Path::kFused : Path::kRebuild;
}

// --- mixed batches -------------------------------------------------------------------------------

// How the rows of an open task are multiplied: kOwn, by a W_t of their own; kApart, with those of the base, by one
// product of all such rows with W, and by Delta, whose product is added.
enum class Mixing { kOwn, kApart };

inline const char* name_of(Mixing mixing) { return mixing == Mixing::kOwn ? "own" : "apart"; }

struct MixedProblem {
  bool addable = false;  // one type of W, Delta and rows, and none that rounds a sum of two products
  bool fused = false;    // a W_t of their own would be made in registers
  long long rows = 0;    // of the task
  long long outputs = 0;
  long long inputs = 0;
};

constexpr Mixing choose_mixing(const MixedProblem& problem) {
  if (!problem.addable || problem.fused || problem.rows > rules::kMostApartRows) return Mixing::kOwn;
  const long long least = problem.rows == 1 ? rules::kLeastOfOneRow : rules::kLeastApartWeights;
  return problem.outputs * problem.inputs >= least ? Mixing::kApart : Mixing::kOwn;
}

// --- splits --------------------------------------------------------------------------------------

// What adds the sums of a linear layer's product on CUDA whose depth is split over blocks: a second kernel, or, up to
// eight of them, the blocks themselves, as a cluster, which moves no sums through memory and saves the launch. The same
// splits have the same bits; but a cluster's cost less, so that a device that has clusters may split more.
enum class Adding { kKernel, kCluster };

inline const char* name_of(Adding adding) { return adding == Adding::kCluster ? "cluster" : "kernel"; }

// Whether kernels have clusters: from major number 9 of a device's compute capability on, if their code is of that,
// too. A device runs code of an earlier one (`code`: 80 for PTX of 8.0), which has no clusters in it.
constexpr bool has_clusters(int capability, int code) { return capability >= 9 && code >= 90; }

// By the most blocks that a cluster may have there; 0 where there are no clusters.
constexpr Adding choose_adding(int most_of_cluster) { return most_of_cluster > 1 ? Adding::kCluster : Adding::kKernel; }

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

inline std::atomic<int>& forced_mixing() {
  static std::atomic<int> mixing{-1};
  return mixing;
}

inline void force_mixing(const std::string& name) {
  if (name != "" && name != "own" && name != "apart") {
    throw std::runtime_error("mixing: expected own, apart or None, got " + name);
  }
  forced_mixing() = name.empty() ? -1 : static_cast<int>(name == "own" ? Mixing::kOwn : Mixing::kApart);
}

// A forced one that cannot give the right answer is not taken: a batch has tasks of several kinds.
inline Mixing chosen_mixing(const MixedProblem& problem) {
  const int forced = forced_mixing().load(std::memory_order_relaxed);
  if (forced < 0 || !problem.addable) return choose_mixing(problem);
  return static_cast<Mixing>(forced);
}

inline std::atomic<int>& forced_adding() {
  static std::atomic<int> adding{-1};
  return adding;
}

inline void force_adding(const std::string& name) {
  if (name != "" && name != "kernel" && name != "cluster") {
    throw std::runtime_error("adding: expected kernel, cluster or None, got " + name);
  }
  forced_adding() = name.empty() ? -1 : static_cast<int>(name == "kernel" ? Adding::kKernel : Adding::kCluster);
}

// A cluster that is forced where there are none is refused.
inline Adding chosen_adding(int most_of_cluster) {
  const int forced = forced_adding().load(std::memory_order_relaxed);
  const Adding chosen = choose_adding(most_of_cluster);
  if (forced < 0) return chosen;
  if (forced == static_cast<int>(Adding::kCluster) && chosen != Adding::kCluster) {
    throw std::runtime_error(
        "adding: cluster is forced, but the device has none: its compute capability, or that of the extension's "
        "kernels, is below 9.0, or it is a slice without room for two blocks");
  }
  return static_cast<Adding>(forced);
}

// The path that this thread's last product with W_t took, or -1, and whether a predicted threshold had a say in it.
struct Taken {
  int path = -1;
  bool predicted = false;
};

inline Taken& taken_path() {
  static thread_local Taken taken;
  return taken;
}

inline Path chosen_path(const Problem& problem) {
  const Path path = checked_path(problem);
  taken_path() = {static_cast<int>(path), problem.open && problem.fusable && is_predicted(problem)};
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
