// The tile loop on the twin: shapes off every grid, both 16-bit types, Delta in fp32 and in 16 bits, gates known and
// read, split sums, odd leading dimensions and offsets, against float64.
#include <cstdlib>

#include "linear_case.h"

using namespace taps::dev;  // NOLINT
using host::check;
using host::Shape;
using host::Tested;

namespace {

template <class T, class D>
using Square = Tested<T, D, 64, 64, 2, 2, 3>;
template <class T, class D>
using Flat = Tested<T, D, 16, 64, 1, 4, 4>;  // few rows

constexpr int64_t kSizes[] = {1, 3, 17, 33, 65, 257};

template <class T, class D>
std::string one(int64_t m, int64_t n, int64_t k, Gate gate, float score, int splits, bool bias, uint64_t seed) {
  const Shape shape{m, n, k, 0, 0, splits};
  return m <= 17 ? check<Flat<T, D>, T, D>(shape, gate, score, bias, seed)
                 : check<Square<T, D>, T, D>(shape, gate, score, bias, seed);
}

// All shapes with all gates and splits, or a third of the small ones with one of each.
template <class T, class D>
std::string shapes(bool thorough) {
  int i = 0;
  for (const int64_t m : kSizes) {
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        ++i;
        const auto seed = static_cast<uint64_t>(i % 7);
        std::string problem;
        if (!thorough) {
          if (m * n * k > 300000 || i % 3 != 0) continue;
          const Gate gate = i % 4 == 0 ? Gate::kClosed : (i % 4 == 1 ? Gate::kOpen : Gate::kRead);
          problem = one<T, D>(m, n, k, gate, i % 4 == 2 ? 0.1f : 0.05f, i % 5 == 0 ? 3 : 1, i % 2 == 0, seed);
        } else {
          for (const int splits : {1, 3}) {
            for (const auto& [gate, score] : {std::pair(Gate::kClosed, 0.0f), std::pair(Gate::kOpen, 0.0f),
                                              std::pair(Gate::kRead, 0.1f), std::pair(Gate::kRead, 0.05f)}) {
              if (problem.empty()) problem = one<T, D>(m, n, k, gate, score, splits, i % 2 == 0, seed);
            }
          }
        }
        if (!problem.empty()) return problem;
      }
    }
  }
  return "";
}

bool thorough() { return std::getenv("TAPS_THOROUGH") != nullptr; }

}  // namespace

TAPS_CASE(shapes_bf16_delta_fp32) { return shapes<bf16, float>(thorough()); }
TAPS_CASE(shapes_f16_delta_fp32) { return shapes<f16, float>(thorough()); }
TAPS_CASE(shapes_bf16_delta_bf16) { return shapes<bf16, bf16>(thorough()); }

TAPS_CASE(every_gate_and_split_of_one_shape) {
  for (const Gate gate : {Gate::kClosed, Gate::kOpen, Gate::kRead}) {
    for (const float score : {0.05f, 0.1f, 0.15f}) {
      for (const int splits : {1, 2, 5}) {
        const Shape shape{33, 65, 257, 0, 0, splits};
        const std::string problem = check<Square<bf16, float>, bf16, float>(shape, gate, score, true, 3);
        if (!problem.empty()) return problem;
      }
    }
  }
  return "";
}

// Whole pieces of 16 bytes, rows that start off them, and pointers that do.
TAPS_CASE(leading_dimensions_and_offsets) {
  for (const int64_t padding : {0, 1, 7, 8}) {
    for (const int64_t offset : {0, 1, 8}) {
      const Shape shape{20, 40, 96, padding, offset, 1};
      std::string problem = check<Square<f16, float>, f16, float>(shape, Gate::kOpen, 0, true, 1);
      if (problem.empty()) problem = check<Flat<bf16, bf16>, bf16, bf16>({5, 40, 96, padding, offset, 2}, Gate::kOpen, 0, false, 2);
      if (!problem.empty()) return "padding " + std::to_string(padding) + " offset " + std::to_string(offset) + ": " + problem;
    }
  }
  return "";
}

int main() { return host::run_all(); }
