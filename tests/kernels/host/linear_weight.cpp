// The gated linear layer's weight gradient on the twin: G in registers, what leaves of it, and its product with Delta.
#include "linear_case.h"

using namespace host;  // NOLINT

namespace {

constexpr int64_t kSizes[] = {1, 3, 17, 33, 65, 257};
bool every_shape = false;  // with any argument to the program

template <class T, class D>
std::string shapes() {
  int i = 0;
  for (const int64_t m : kSizes) {
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        ++i;
        if (!every_shape && (m * n * k > 100000 || i % 4 != 3)) continue;
        Problem problem{m, n, k};
        problem.seed = static_cast<uint64_t>(i % 7);
        problem.scale = i / 4 % 2 == 0 ? 1.0 : 2.5;
        for (const Known gate : {Known::kOpen, Known::kClosed, Known::kRead}) {
          problem.gate = gate;
          problem.score = i / 4 % 2 == 0 ? 0.05 : 0.1;
          problem.dot = i / 4 % 4 != 1;
          problem.result = i / 4 % 4 != 2;
          if (std::string wrong = check_weight<WeightGradient<WeightTile, T, D>, T, D>(problem); !wrong.empty())
            return wrong;
          ++host::problems();
        }
      }
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(bf16_delta_fp32) { return shapes<bf16, float>(); }
TAPS_CASE(f16_delta_f16) { return shapes<f16, f16>(); }
TAPS_CASE(tf32) { return shapes<float, float>(); }

// Whole tiles and parts of them, whose rows and first elements can be read in pairs or cannot.
TAPS_CASE(leading_dimensions_and_offsets) {
  for (const int64_t padding : {0, 1, 2, 8}) {
    for (const int64_t offset : {0, 1, 2, 8}) {
      Problem problem{20, 70, 130};
      problem.padding = padding, problem.offset = offset, problem.exact = padding != 2;
      for (const bool result : {true, false}) {
        problem.result = result;
        std::string wrong = check_weight<WeightGradient<WeightTile, f16, float>, f16, float>(problem);
        if (wrong.empty()) wrong = check_weight<WeightGradient<WeightTile, bf16, bf16>, bf16, bf16>(problem);
        if (!wrong.empty())
          return "padding " + std::to_string(padding) + " offset " + std::to_string(offset) + ": " + wrong;
      }
    }
  }
  return "";
}

// No rows at all: zeros, and a product of zero.
TAPS_CASE(no_rows) { return check_weight<WeightGradient<WeightTile, bf16, float>, bf16, float>({0, 5, 7}); }

int main(int argc, char**) {
  every_shape = argc > 1;
  const int failed = run_all();
  std::printf("%d problems\n", problems());
  return failed;
}
