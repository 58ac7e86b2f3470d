// From the gradients of many W_t to those of their Deltas and scores, in one pass over both: g * G, and <G, Delta> in
// fp64, chunk by chunk; then one block to a tensor adds up its chunks, in one order. What `dot_flat` and `dot_finish`
// give for each tensor alone, to the bit, but where G lies turned (outer != 0). One definition for nvcc and for the
// twin; the launches are in settle.cu.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/foreach.cuh"
#include "cuda/gate.cuh"

namespace taps::dev {

TAPS_BOTH inline bool takes_vectors(const Settle& one) {
  return one.outer == 0 && aligned(one.gradient) && aligned(one.delta) && aligned(one.delta_gradient);
}

// Where G's element is that belongs to Delta's element `at`.
TAPS_DEVICE int64_t place_of_gradient(const Settle& one, int64_t at) {
  if (one.outer == 0) return at;
  const int64_t row = static_cast<int64_t>(one.outer) * one.inner, first = at / row * row;
  const auto within = static_cast<uint32_t>(at - first);
  return first + static_cast<int64_t>(within % one.inner) * one.outer + within / one.inner;
}

// T is what is computed in. Where the gate is closed G is read for the score alone, and Delta's gradient is zero.
template <class T>
TAPS_DEVICE void foreach_settle(const ForeachSettle& args) {
  const Chunk chunk = chunk_of(args);
  const Settle& one = args.items[chunk.item];
  const bool open = is_open(one.gate), dot = one.score_gradient, reads = dot || open;
  double sum = 0.0;
  int64_t done = chunk.begin;
  if (takes_vectors(one)) {  // a chunk begins at a multiple of kVector
    const int64_t whole = (chunk.end - chunk.begin) / kVector;
    for (int64_t i = tid(); i < whole; i += nthreads()) {
      const int64_t at = chunk.begin + i * kVector;
      T gradient[kVector] = {};
      if (reads) load_vector(one.gradient, one.gradient_dtype, at, gradient);
      if (dot) {
        T delta[kVector];
        load_vector(one.delta, one.delta_dtype, at, delta);
#pragma unroll
        for (int k = 0; k < kVector; ++k) sum += static_cast<double>(gradient[k]) * static_cast<double>(delta[k]);
      }
      if (one.delta_gradient) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) gradient[k] = open ? gradient[k] : T(0);
        store_vector(one.delta_gradient, one.delta_dtype, at, gradient);
      }
    }
    done = chunk.begin + whole * kVector;
  }
  for (int64_t i = done + tid(); i < chunk.end; i += nthreads()) {  // tail, or operands that lie differently
    const T gradient = reads ? load_one<T>(one.gradient, one.gradient_dtype, place_of_gradient(one, i)) : T(0);
    if (dot) sum += static_cast<double>(gradient) * static_cast<double>(load_one<T>(one.delta, one.delta_dtype, i));
    if (one.delta_gradient) store_one(one.delta_gradient, one.delta_dtype, i, open ? gradient : T(0));
  }
  if (!dot) return;  // as a whole block
  const double total = block_sum(sum);
  if (tid() == 0) args.partials[bid_x()] = total;
}

// A block to a tensor.
TAPS_DEVICE void foreach_finish(const ForeachSettle& args) {
  const auto item = static_cast<int>(bid_x());
  const Settle& one = args.items[item];
  if (!one.score_gradient) return;
  const int32_t first = item > 0 ? args.end[item - 1] : 0;
  dot_finish(args.partials + first, args.end[item] - first, 1.0, one.score_gradient, one.score_dtype);
}

}  // namespace taps::dev
