// torch's own thread pool, without a lambda per call crossing the ABI by value.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace taps::cpu {

// Below this many elements a second thread costs more than it brings (about 10 microseconds).
constexpr int64_t kGrain = 32768;

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& body) {
  if (n <= grain) {
    if (n > 0) body(0, n);
    return;
  }
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      0, n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body))));
}

// Calls body(offsets of the row's first element, ...) for rows [begin, end) of a strided walk.
template <class Walk, int N, class F>
void for_rows(const Walk& walk, int64_t begin, int64_t end, const F& body) {
  const int outer = walk.ndim - 1;
  for (int64_t row = begin; row < end; ++row) {
    int64_t offset[N] = {};
    int64_t rest = row;
    for (int dim = outer - 1; dim >= 0; --dim) {
      const int64_t index = rest % walk.sizes[dim];
      rest /= walk.sizes[dim];
      for (int k = 0; k < N; ++k) offset[k] += index * walk.strides[k][dim];
    }
    body(row, offset);
  }
}

}  // namespace taps::cpu
