// A few cases of a small tile, to be compiled against csrc/cuda/tile.cuh with a mistake planted in it: the test
// that does so expects a finding or a wrong result, and this program to pass without one.
#include "linear_case.h"

using namespace taps::dev;  // NOLINT
using host::check;
using host::Tested;

namespace {

using Small = Tested<bf16, float, 32, 32, 1, 2, 3>;
using Narrow = Tested<bf16, bf16, 16, 32, 1, 2, 4>;

}  // namespace

TAPS_CASE(small_tiles) {
  const host::Shape shapes[] = {{33, 31, 130}, {32, 64, 96}, {5, 33, 65, 3, 0, 2}, {17, 40, 160, 8, 0, 1}};
  for (const host::Shape& shape : shapes) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      std::string problem = check<Small, bf16, float>(shape, Gate::kOpen, 0.0f, true, seed);
      if (problem.empty()) problem = check<Small, bf16, float>(shape, Gate::kClosed, 0.0f, false, seed);
      if (problem.empty()) problem = check<Narrow, bf16, bf16>(shape, Gate::kRead, 0.2f, false, seed);
      if (!problem.empty()) return problem;
    }
  }
  return "";
}

int main() { return host::run_all(); }
