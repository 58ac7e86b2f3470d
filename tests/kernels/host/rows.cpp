// The gated linear layer's forward for up to four rows on the twin, to the bit: shapes on and off its pieces and steps,
// all types, gates known and read, slices, and operands at every alignment.
#include "rows_case.h"

using namespace host;  // NOLINT

namespace {

constexpr int64_t kOutputs[] = {1, 2, 15, 16, 33};
constexpr int64_t kInputs[] = {0, 1, 7, 8, 30, 248, 256, 264, 513, 768, 1024, 1544, 2100};
constexpr int kSlices[] = {1, 2, 4, 8};
constexpr std::pair<Known, double> kGates[] = {
    {Known::kClosed, 0.0}, {Known::kOpen, 0.0}, {Known::kRead, 0.15}, {Known::kRead, 0.05}, {Known::kReadDouble, 0.1}};
// Elements beside and before a matrix: rows on 16 bytes, on 4, on odd elements.
constexpr std::pair<int64_t, int64_t> kPlaces[] = {{0, 0}, {8, 8}, {2, 0}, {0, 2}, {1, 0}, {0, 1}, {7, 0}, {6, 0}};
bool every_shape = false;  // with any argument to the program

template <class T, class W, class D>
std::string one(const FewRowsProblem& problem) {
  const Tiles tiles = problem.m == 1 ? Tiles::kOneRow : Tiles::kFourRows;
  std::string wrong = "no kernel";
  with_activation<T, W, D>(Product::kForward, tiles, [&](auto instance) {
    using Body = typename decltype(instance)::type;
    if constexpr (kInSlices<Body>) wrong = check_rows<Body, T, W, D>(problem);
  });
  ++host::problems();
  return wrong;
}

// Every shape with a gate, slices and a bias in turn; without an argument to the program a seventh of them.
template <class T, class W, class D>
std::string shapes() {
  int i = 0;
  for (int64_t m = 1; m <= Warps::kMostRows; ++m) {
    for (const int64_t n : kOutputs) {
      for (const int64_t k : kInputs) {
        for (const int slices : kSlices) {
          ++i;
          if (!every_shape && i % 7 != 0) continue;
          FewRowsProblem problem;
          problem.m = m, problem.n = n, problem.k = k, problem.slices = slices;
          problem.seed = static_cast<uint64_t>(i % 3);
          problem.bias = i / 4 % 2 == 0;
          std::tie(problem.gate, problem.score) = kGates[i % 5];
          if (std::string wrong = one<T, W, D>(problem); !wrong.empty()) return wrong;
        }
      }
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(all_bf16) { return shapes<bf16, bf16, bf16>(); }
TAPS_CASE(bf16_delta_fp32) { return shapes<bf16, bf16, float>(); }
TAPS_CASE(bf16_autocast) { return shapes<bf16, float, float>(); }
TAPS_CASE(all_f16) { return shapes<f16, f16, f16>(); }
TAPS_CASE(f16_delta_fp32) { return shapes<f16, f16, float>(); }
TAPS_CASE(f16_autocast) { return shapes<f16, float, float>(); }

TAPS_CASE(slices_are_added_in_order) { return check_slices(); }

// x, W and Delta, each wherever it may lie: the bits are those of rows on 16 bytes.
TAPS_CASE(places) {
  int at = 0;
  for (const int64_t k : {520, 522, 521}) {
    for (const auto& x : kPlaces) {
      for (const auto& weight : kPlaces) {
        for (const auto& delta : kPlaces) {
          if (!every_shape && ++at % 7 != 0) continue;
          FewRowsProblem problem;
          problem.m = 3, problem.n = 3, problem.k = k, problem.slices = 2;
          int i = 0;
          for (const auto& [padding, offset] : {x, weight, delta}) {
            problem.paddings[i] = padding, problem.offsets[i++] = offset;
          }
          std::string wrong = one<bf16, bf16, bf16>(problem);
          problem.m = 1;
          if (wrong.empty()) wrong = one<f16, f16, float>(problem);
          problem.gate = Known::kClosed;  // where Delta lies does not matter
          if (wrong.empty() && delta == kPlaces[4]) wrong = one<bf16, float, float>(problem);
          if (!wrong.empty()) return wrong;
        }
      }
    }
  }
  return "";
}

// Grids as they are planned: each depth once, slices that begin on lines of memory, none without a part of the depth,
// and two blocks to a multiprocessor where the depth is there.
TAPS_CASE(planned) {
  unsigned most = 0;
  for (const int multiprocessors : {1, 8, 132}) {
    for (const int64_t n : {1, 16, 1000, 1024, 4096, 50257}) {
      for (const int64_t k : {0, 1, 64, 1023, 1024, 1090, 2048, 4096, 4100, 11008}) {
        LinearProduct p;
        p.rows = 4, p.outputs = n, p.inputs = k;
        const Grid grid = plan(Product::kForward, p, {multiprocessors});
        const std::string name = std::to_string(n) + " x " + std::to_string(k);
        const int64_t columns = Warps::kWarps / static_cast<int64_t>(grid.slices) * Warps::kOutputs;
        if (grid.tiles * columns < n || (grid.tiles - 1) * columns >= n) return "tiles of " + name;
        if (grid.slices * grid.depth_of_split < k) return "depth of " + name;
        if (k > 0 && (grid.slices - 1) * grid.depth_of_split >= k) return "an empty slice of " + name;
        if (grid.depth_of_split % Warps::kAlign != 0) return "alignment of " + name;
        if (grid.slices > 1 && grid.depth_of_split < Warps::kLeastDepth) return "a shallow slice of " + name;
        const bool full = grid.tiles >= 2 * static_cast<unsigned>(multiprocessors) || grid.slices == Warps::kWarps;
        if (!full && k >= 2 * grid.slices * Warps::kLeastDepth) return "too few blocks of " + name;
        most = std::max(most, grid.slices);
        taps::Convolution pixels;  // as many pixels are tiles
        static_cast<LinearProduct&>(pixels) = p;
        if (plan(Product::kForward, pixels, {multiprocessors}).tiles != (n + FewRows::kColumns - 1) / FewRows::kColumns)
          return "pixels of " + name;
      }
    }
  }
  LinearProduct none;
  none.outputs = 16, none.inputs = 64;
  if (plan(Product::kForward, none, {8}).tiles != 0) return "expected no blocks without rows";
  if (most != Warps::kWarps) return "expected a plan with " + std::to_string(Warps::kWarps) + " slices";
  for (const int multiprocessors : {1, 8, 132}) {
    for (int64_t m = 1; m <= Warps::kMostRows; ++m) {
      FewRowsProblem problem;
      problem.m = m, problem.n = 37, problem.k = 4100, problem.multiprocessors = multiprocessors;
      if (std::string wrong = one<bf16, bf16, float>(problem); !wrong.empty()) return wrong;
    }
  }
  return "";
}

int main(int argc, char**) {
  every_shape = argc > 1;
  const int failed = run_all();
  std::printf("%d problems\n", problems());
  return failed;
}
