// The fixed-order dot product: one block and one partial sum per chunk, then one block over the partial sums. No
// atomics; the same bits every time. One definition for nvcc and for the twin; the launches are in dot.cu.
#pragma once

#include "cuda/block.cuh"
#include "cuda/elements.cuh"

namespace taps::dev {

constexpr unsigned kDotShared = kThreads * sizeof(double);

// T is what the operands are read as; products and sums are fp64 either way.
template <class T>
TAPS_DEVICE void dot_flat(const Dot& args, bool vectors) {
  const int64_t begin = static_cast<int64_t>(bid_x()) * kDotChunk, left = args.walk.numel - begin;
  const int64_t end = begin + (left < kDotChunk ? left : kDotChunk);
  double sum = 0.0;
  int64_t done = begin;
  if (vectors) {  // kDotChunk is a multiple of kVector, so every vector is aligned
    const int64_t whole = (end - begin) / kVector;
    for (int64_t i = tid(); i < whole; i += nthreads()) {
      T a[kVector], b[kVector];
      load_vector(args.a, args.a_dtype, begin + i * kVector, a);
      load_vector(args.b, args.b_dtype, begin + i * kVector, b);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
    }
    done = begin + whole * kVector;
  }
  for (int64_t i = done + tid(); i < end; i += nthreads()) {  // tail, or misaligned operands
    sum += static_cast<double>(load_one<T>(args.a, args.a_dtype, i)) *
           static_cast<double>(load_one<T>(args.b, args.b_dtype, i));
  }
  const double total = block_sum(sum);
  if (tid() == 0) args.partials[bid_x()] = total;
}

TAPS_DEVICE void dot_strided(const Dot& args, int64_t per_chunk) {
  const int64_t begin = static_cast<int64_t>(bid_x()) * per_chunk, left = args.walk.numel - begin;
  const int64_t end = begin + (left < per_chunk ? left : per_chunk);
  double sum = 0.0;
  for (int64_t i = begin + tid(); i < end; i += nthreads()) {
    int64_t at[2];
    offsets_of(args.walk, i, at);
    sum += load_one<double>(args.a, args.a_dtype, at[0]) * load_one<double>(args.b, args.b_dtype, at[1]);
  }
  const double total = block_sum(sum);
  if (tid() == 0) args.partials[bid_x()] = total;
}

// result = scale * the sum of `count` values, by one block.
TAPS_DEVICE void dot_finish(const double* values, int64_t count, double scale, void* result, Dtype dtype) {
  double sum = 0.0;
  for (int64_t i = tid(); i < count; i += nthreads()) sum += values[i];
  const double total = block_sum(sum);
  if (tid() == 0) store_one(result, dtype, 0, total * scale);
}

}  // namespace taps::dev
