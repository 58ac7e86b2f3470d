// How a kernel goes through the elements of its operands.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace taps {

constexpr int kMaxDims = 8;

// Operands walked together, element by element. Dimensions are coalesced and sorted by the strides
// of operand 0, innermost last; `ndim == 1` with unit strides is the flat case that matters.
template <int N>
struct Walk {
  int64_t numel = 0;
  int ndim = 0;
  int64_t sizes[kMaxDims];
  int64_t strides[N][kMaxDims];  // in elements

  bool flat() const {
    if (ndim > 1) return false;
    for (int k = 0; k < N; ++k) {
      if (ndim == 1 && strides[k][0] != 1) return false;
    }
    return true;
  }
};

// Of operands that lie dense and alike.
template <int N>
Walk<N> flat_walk(int64_t numel) {
  Walk<N> walk;
  walk.numel = numel;
  walk.ndim = 1;
  walk.sizes[0] = numel;
  for (auto& stride : walk.strides) stride[0] = 1;
  return walk;
}

// Of operands with these sizes and with strides of their own. `Sizes`: anything like a span of int64_t.
template <int N, class Sizes>
Walk<N> make_walk(const Sizes& sizes, const std::array<Sizes, N>& strides) {
  Walk<N> walk;
  walk.numel = 1;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    walk.numel *= sizes[dim];
    if (sizes[dim] == 1) continue;
    if (walk.ndim == kMaxDims) {
      throw std::runtime_error("expected at most " + std::to_string(kMaxDims) + " dimensions");
    }
    // Insertion by the strides of operand 0, ties by those of the next.
    int at = walk.ndim++;
    const auto goes_before = [&](int other) {
      for (int k = 0; k < N; ++k) {
        if (strides[k][dim] != walk.strides[k][other]) {
          return strides[k][dim] > walk.strides[k][other];
        }
      }
      return false;
    };
    for (; at > 0 && goes_before(at - 1); --at) {
      walk.sizes[at] = walk.sizes[at - 1];
      for (int k = 0; k < N; ++k) walk.strides[k][at] = walk.strides[k][at - 1];
    }
    walk.sizes[at] = sizes[dim];
    for (int k = 0; k < N; ++k) walk.strides[k][at] = strides[k][dim];
  }
  int kept = 0;  // merge neighbours that every operand walks as one
  for (int dim = 1; dim < walk.ndim; ++dim) {
    bool merges = true;
    for (int k = 0; k < N; ++k) {
      merges &= walk.strides[k][kept] == walk.strides[k][dim] * walk.sizes[dim];
    }
    if (!merges) ++kept;
    walk.sizes[kept] = merges ? walk.sizes[kept] * walk.sizes[dim] : walk.sizes[dim];
    for (int k = 0; k < N; ++k) walk.strides[k][kept] = walk.strides[k][dim];
  }
  if (walk.ndim > 0) walk.ndim = kept + 1;
  return walk;
}

}  // namespace taps
