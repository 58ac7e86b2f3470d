// The gated linear layer's forward and input gradient on the twin: shapes off every grid, all types, gates known and
// read, split sums, odd leading dimensions and offsets, against float64.
#include "core/choose.h"
#include "linear_case.h"

using namespace host;  // NOLINT

namespace {

constexpr int64_t kRows[] = {1, 3, 9, 17, 33, 65, 257}, kSizes[] = {1, 3, 17, 33, 65, 257};
bool every_shape = false;  // with any argument to the program
constexpr std::pair<Known, double> kGates[] = {
    {Known::kClosed, 0.0}, {Known::kOpen, 0.0}, {Known::kRead, 0.15}, {Known::kRead, 0.05}, {Known::kReadDouble, 0.1}};

template <class T, class W, class D>
std::string one(Product kind, const Problem& problem, Tiles tiles) {
  std::string wrong;
  with_activation<T, W, D>(
      kind, tiles, [&](auto instance) { wrong = check<typename decltype(instance)::type, T, W, D>(kind, problem); });
  return wrong;
}
template <class T, class W, class D>
std::string one(Product kind, const Problem& problem) {
  const bool none = sizeof(T) == 2 && kind == Product::kForward && problem.m <= Warps::kMostRows;
  if (none) return one<T, W, D>(kind, problem, problem.m == 1 ? Tiles::kOneRow : Tiles::kFourRows);
  return one<T, W, D>(kind, problem, problem.m <= kFewRows ? Tiles::kFewRows : Tiles::kMoreRows);
}

// A quarter of the small shapes, each with a gate and a split; or, with an argument to the program, all of them, for
// one type of each product with every gate and split.
template <class T, class W, class D>
std::string shapes(Product kind) {
  const bool every = every_shape && std::is_same_v<T, bf16> && std::is_same_v<W, bf16>;
  int i = 0;
  for (const int64_t m : kRows) {
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        ++i;
        if (!every_shape && (m * n * k > 100000 || i % 4 != 3)) continue;
        Problem problem{m, n, k};
        problem.bias = i / 4 % 2 == 0;
        problem.seed = static_cast<uint64_t>(i % 7);
        for (const int splits : {1, 3}) {
          for (const auto& [gate, score] : kGates) {
            if (!every && (kGates[i / 4 % 5] != std::pair(gate, score) || splits != (i % 5 == 0 ? 3 : 1))) continue;
            problem.gate = gate, problem.score = score, problem.splits = splits;
            if (std::string wrong = one<T, W, D>(kind, problem); !wrong.empty()) return wrong;
            ++host::problems();
          }
        }
      }
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(forward_bf16_delta_fp32) { return shapes<bf16, bf16, float>(Product::kForward); }
TAPS_CASE(forward_f16_delta_f16) { return shapes<f16, f16, f16>(Product::kForward); }
TAPS_CASE(forward_bf16_autocast) { return shapes<bf16, float, float>(Product::kForward); }
TAPS_CASE(forward_tf32) { return shapes<float, float, float>(Product::kForward); }
TAPS_CASE(input_gradient_bf16_delta_fp32) { return shapes<bf16, bf16, float>(Product::kInputGradient); }
TAPS_CASE(input_gradient_f16_delta_f16) { return shapes<f16, f16, f16>(Product::kInputGradient); }
TAPS_CASE(input_gradient_f16_autocast) { return shapes<f16, float, float>(Product::kInputGradient); }
TAPS_CASE(input_gradient_tf32) { return shapes<float, float, float>(Product::kInputGradient); }

// Wide tiles of 64 and of 128 rows: half of the shapes, of more than few rows, each with a gate and a split; or all.
template <class T, class W, class D>
std::string wide_shapes() {
  int i = 0;
  for (const int64_t m : kSizes) {
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        for (const Tiles tiles : {Tiles::kWide, Tiles::kWidest}) {
          ++i;
          if (m <= kFewRows || (!every_shape && (m * n * k > 300000 || i % 4 > 1))) continue;
          Problem problem{m, n, k};
          std::tie(problem.gate, problem.score) = kGates[i / 2 % 5];
          problem.splits = i % 7 % 3 + 1;
          problem.bias = i / 4 % 2 == 0;
          problem.padding = i % 11 == 0 ? 8 : i % 11 == 1 ? 2 : 0;
          problem.offset = i % 13 == 0 ? 1 : i % 13 == 1 ? 8 : 0;
          problem.seed = static_cast<uint64_t>(i % 5);
          if (std::string wrong = one<T, W, D>(Product::kForward, problem, tiles); !wrong.empty()) return wrong;
          ++host::problems();
        }
      }
    }
  }
  return "";
}
TAPS_CASE(wide_bf16_delta_bf16) { return wide_shapes<bf16, bf16, bf16>(); }
TAPS_CASE(wide_bf16_delta_fp32) { return wide_shapes<bf16, bf16, float>(); }
TAPS_CASE(wide_f16_autocast) { return wide_shapes<f16, float, float>(); }

TAPS_CASE(every_gate_and_split_of_one_shape) {
  for (const Product kind : {Product::kForward, Product::kInputGradient}) {
    for (const auto& [gate, score] : kGates) {
      for (const int splits : {1, 2, 5}) {
        Problem problem{33, 65, 257, gate, score, splits, true};
        std::string wrong = one<bf16, bf16, float>(kind, problem);
        problem.m = 130, problem.n = 129;
        for (const Tiles tiles : {Tiles::kWide, Tiles::kWidest}) {
          if (wrong.empty() && kind == Product::kForward) wrong = one<bf16, bf16, bf16>(kind, problem, tiles);
        }
        if (!wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

// Rows that begin on 16 bytes, on 4, on odd elements, and pointers that do.
TAPS_CASE(leading_dimensions_and_offsets) {
  for (const Product kind : {Product::kForward, Product::kInputGradient}) {
    for (const int64_t padding : {0, 1, 2, 7, 8}) {
      for (const int64_t offset : {0, 1, 2, 8}) {
        Problem problem{20, 40, 96};
        problem.padding = padding, problem.offset = offset, problem.bias = true;
        std::string wrong = one<f16, f16, float>(kind, problem);
        for (const Tiles tiles : {Tiles::kWide, Tiles::kWidest}) {
          if (wrong.empty()) wrong = one<bf16, bf16, bf16>(kind, problem, tiles);
          if (wrong.empty()) wrong = one<f16, float, float>(kind, problem, tiles);
        }
        problem.m = 3, problem.splits = 2;
        if (wrong.empty()) wrong = one<f16, f16, float>(kind, problem);
        problem.m = 5;
        if (wrong.empty()) wrong = one<bf16, bf16, bf16>(kind, problem);
        if (wrong.empty()) wrong = one<float, float, float>(kind, problem);
        if (!wrong.empty())
          return "padding " + std::to_string(padding) + " offset " + std::to_string(offset) + ": " + wrong;
      }
    }
  }
  return "";
}

// Grids as they are planned for devices of one and of many multiprocessors.
TAPS_CASE(planned_splits) {
  bool split = false, clustered = false, beyond = false;
  for (const int multiprocessors : {1, 8, 132}) {
    for (const int64_t depth : {40, 700, 2100}) {
      for (const Product kind : {Product::kForward, Product::kInputGradient}) {
        Problem problem{3, 40, depth};
        if (kind == Product::kInputGradient) std::swap(problem.n, problem.k);
        problem.splits = 0, problem.multiprocessors = multiprocessors;
        std::string wrong = one<bf16, bf16, float>(kind, problem);
        problem.m = 9;
        if (wrong.empty()) wrong = one<bf16, bf16, float>(kind, problem);
        if (!wrong.empty()) return wrong;
      }
    }
    // The plan itself: every depth exactly once, and no split without a depth.
    for (const int64_t columns : {64, 1024, 4096, 5000}) {
      for (const int64_t depth : {0, 1, 255, 4096, 4097}) {
        const Grid grid = plan<FewRows>(Tiles::kFewRows, {16, columns, depth, 6}, {multiprocessors});
        split = split || grid.splits > 1;
        const int64_t covered = grid.splits * grid.depth_of_split, without_last = covered - grid.depth_of_split;
        if (covered < depth || (grid.splits > 1 && without_last >= depth)) return "plan of " + std::to_string(depth);
        if (grid.bytes != (grid.splits > 1 ? 4 * 16 * columns * static_cast<int64_t>(grid.splits) : 0)) return "bytes";
        for (const int most : {8, 4, 1}) {  // a slice of a device has room for fewer
          const Grid other = plan<FewRows>(Tiles::kFewRows, {16, columns, depth, 6}, {multiprocessors, most});
          const bool fits = other.splits > 1 && static_cast<int>(other.splits) <= most;
          if (other.clustered != fits) return "clusters of " + std::to_string(most);
          if ((other.bytes != 0) != (other.splits > 1 && !fits)) return "bytes of clusters";
          clustered = clustered || other.clustered;
          beyond = beyond || (most == 4 && other.splits > 4);
        }
      }
    }
  }
  return split && clustered && beyond ? "" : "expected a plan that splits, one in clusters, one of more than fit";
}

// Tiles as they are planned, of every kind, and the kernels without any.
TAPS_CASE(planned_tiles) {
  const std::pair<Problem, Tiles> problems[] = {{{1, 200, 100}, Tiles::kOneRow},   {{4, 200, 100}, Tiles::kFourRows},
                                                {{16, 200, 100}, Tiles::kFewRows}, {{40, 60, 100}, Tiles::kMoreRows},
                                                {{40, 384, 100}, Tiles::kWide},    {{64, 384, 320}, Tiles::kWide},
                                                {{100, 300, 100}, Tiles::kWidest}, {{300, 300, 70}, Tiles::kWidest}};
  for (auto [problem, tiles] : problems) {
    problem.splits = 0, problem.multiprocessors = 1;
    LinearProduct product;
    product.rows = problem.m, product.outputs = problem.n, product.inputs = problem.k;
    product.delta.data = &product, product.delta_dtype = Dtype::kBFloat16;
    const Tiles planned = plan(Product::kForward, product, {1}).kind;
    if (planned != tiles) return problem.name() + ": tiles " + std::to_string(static_cast<int>(planned));
    if (std::string wrong = one<bf16, bf16, bf16>(Product::kForward, problem, tiles); !wrong.empty()) return wrong;
    ++host::problems();
  }
  return "";
}

TAPS_CASE(splits_are_added_in_order) { return check_splits(); }

// Splits summed by the blocks of a cluster, of every number and in every kind of tile, at edges and inside.
template <class T, class W, class D>
std::string clusters() {
  constexpr std::pair<Problem, Tiles> kProblems[] = {
      {{5, 33, 530}, Tiles::kFewRows},   {{16, 64, 1024}, Tiles::kFewRows}, {{33, 65, 257}, Tiles::kMoreRows},
      {{70, 64, 300}, Tiles::kMoreRows}, {{70, 129, 270}, Tiles::kWide},    {{130, 127, 130}, Tiles::kWidest}};
  int i = static_cast<int>(sizeof(W) + 2 * sizeof(D)) + std::is_same_v<T, f16>;
  for (auto [problem, tiles] : kProblems) {
    for (int splits = 2; splits <= static_cast<int>(kMostOfCluster); ++splits) {
      for (const Product kind : {Product::kForward, Product::kInputGradient}) {
        const bool forward = kind == Product::kForward;
        ++i;
        if ((!forward && tiles != Tiles::kMoreRows) || (!every_shape && i % 5 != 0)) continue;
        problem.splits = splits, problem.seed = static_cast<uint64_t>(i % 5), problem.bias = i % 2 == 0;
        problem.padding = i % 4 == 0 ? 3 : 0;
        if (!forward) std::swap(problem.n, problem.k);
        std::string wrong;
        with_activation<T, W, D>(kind, tiles, [&](auto instance) {
          using Body = typename decltype(instance)::type;
          if constexpr (!kInSlices<Body>) wrong = check_clusters<Body, T, W, D>(kind, problem);
        });
        if (!forward) std::swap(problem.n, problem.k);
        if (!wrong.empty()) return wrong;
        ++host::problems();
      }
    }
  }
  return "";
}
TAPS_CASE(clusters_bf16_delta_bf16) { return clusters<bf16, bf16, bf16>(); }
TAPS_CASE(clusters_bf16_delta_fp32) { return clusters<bf16, bf16, float>(); }
TAPS_CASE(clusters_bf16_autocast) { return clusters<bf16, float, float>(); }
TAPS_CASE(clusters_f16_delta_f16) { return clusters<f16, f16, f16>(); }
TAPS_CASE(clusters_f16_delta_fp32) { return clusters<f16, f16, float>(); }
TAPS_CASE(clusters_f16_autocast) { return clusters<f16, float, float>(); }
TAPS_CASE(clusters_tf32) { return clusters<float, float, float>(); }

TAPS_CASE(what_adds_splits_is_chosen_by_the_device) {
  using taps::Adding, taps::chosen_adding, taps::force_adding;
  using taps::has_clusters;
  // Of the device, and of the code in it: PTX of 8.0 runs on 9.0.
  if (!has_clusters(9, 90) || !has_clusters(12, 120) || has_clusters(8, 80) || has_clusters(9, 80)) return "clusters";
  if (chosen_adding(0) != Adding::kKernel || chosen_adding(1) != Adding::kKernel ||
      chosen_adding(2) != Adding::kCluster || chosen_adding(8) != Adding::kCluster)
    return "chosen";
  force_adding("kernel");
  const bool kernel = chosen_adding(8) == Adding::kKernel;
  force_adding("cluster");
  const bool cluster = chosen_adding(8) == Adding::kCluster;
  std::string said[2];
  try {
    chosen_adding(0);
  } catch (const std::runtime_error& error) {
    said[0] = error.what();
  }
  force_adding("");
  try {
    force_adding("both");
  } catch (const std::runtime_error& error) {
    said[1] = error.what();
  }
  const bool refused = said[0].find("below 9.0") != std::string::npos && said[1].find("got both") != std::string::npos;
  return kernel && cluster && refused ? "" : "forced: " + said[0] + ", " + said[1];
}

TAPS_CASE(nothing_to_add) {
  Problem problem{3, 5, 0};
  problem.bias = true;
  return one<bf16, bf16, float>(Product::kForward, problem);
}

int main(int argc, char**) {
  every_shape = argc > 1;
  const int failed = run_all();
  std::printf("%d problems\n", problems());
  return failed;
}
