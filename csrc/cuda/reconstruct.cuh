// W_t = W + g * Delta. Bound by memory: accesses of 16 bytes, a loop over the grid, a predicated tail. A closed gate
// never touches the delta. One definition for nvcc and for the twin; the launches are in reconstruct.cu.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/foreach.cuh"
#include "cuda/gate.cuh"

namespace taps::dev {

TAPS_BOTH inline bool takes_vectors(const Rebuild& args) {
  return aligned(args.out) && aligned(args.weight) && aligned(args.delta);
}

template <class T>
TAPS_DEVICE T combine(const Rebuild& args, bool open, T weight, T delta) {
  const T sum = args.weight ? (open ? weight + delta : weight) : (open ? delta : T(0));
  const T scale = static_cast<T>(args.scale);
  return scale == T(1) ? sum : sum * scale;
}

// Elements begin to end, of which this thread takes vectors `first`, `first + step`, ..., and so of what is left over.
// `begin` is a multiple of kVector; without `vectors` (misaligned operands) all are taken one by one.
template <class T>
TAPS_DEVICE void rebuild(const Rebuild& args, bool vectors, int64_t begin, int64_t end, int64_t first, int64_t step) {
  const bool open = args.delta && is_open(args.gate);
  const int64_t count = end - begin, whole = vectors ? count / kVector : 0;
  for (int64_t i = first; i < whole; i += step) {
    const int64_t at = begin + i * kVector;
    T weight[kVector] = {}, delta[kVector] = {}, out[kVector];
    if (args.weight) load_vector(args.weight, args.weight_dtype, at, weight);
    if (open) load_vector(args.delta, args.delta_dtype, at, delta);
#pragma unroll
    for (int k = 0; k < kVector; ++k) out[k] = combine(args, open, weight[k], delta[k]);
    store_vector(args.out, args.out_dtype, at, out);
  }
  for (int64_t i = whole * kVector + first; i < count; i += step) {
    const int64_t at = begin + i;
    const T weight = args.weight ? load_one<T>(args.weight, args.weight_dtype, at) : T(0);
    const T delta = open ? load_one<T>(args.delta, args.delta_dtype, at) : T(0);
    store_one(args.out, args.out_dtype, at, combine(args, open, weight, delta));
  }
}

TAPS_DEVICE int64_t place_in_grid() { return static_cast<int64_t>(bid_x()) * nthreads() + tid(); }
TAPS_DEVICE int64_t size_of_grid() { return static_cast<int64_t>(nblocks_x()) * nthreads(); }

template <class T>
TAPS_DEVICE void reconstruct_flat(const Reconstruct& args, bool vectors) {
  rebuild<T>(args, vectors, 0, args.walk.numel, place_in_grid(), size_of_grid());
}

template <class T>
TAPS_DEVICE void reconstruct_strided(const Reconstruct& args) {
  const bool open = args.delta && is_open(args.gate);
  const int64_t step = size_of_grid();
  for (int64_t i = place_in_grid(); i < args.walk.numel; i += step) {
    int64_t at[3];
    offsets_of(args.walk, i, at);
    const T weight = args.weight ? load_one<T>(args.weight, args.weight_dtype, at[1]) : T(0);
    const T delta = open ? load_one<T>(args.delta, args.delta_dtype, at[2]) : T(0);
    store_one(args.out, args.out_dtype, at[0], combine(args, open, weight, delta));
  }
}

// One block to a chunk of a tensor.
template <class T>
TAPS_DEVICE void foreach_reconstruct(const ForeachReconstruct& args) {
  const Chunk chunk = chunk_of(args);
  const Rebuild& one = args.items[chunk.item];
  rebuild<T>(one, takes_vectors(one), chunk.begin, chunk.end, tid(), nthreads());
}

// --- the grid, on the host
// --------------------------------------------------------------------------------------------

// Blocks of 256 threads: eight are all that a multiprocessor holds; more would only queue.
inline unsigned reconstruct_blocks(const Reconstruct& args, int multiprocessors) {
  const bool vectors = args.walk.flat() && takes_vectors(args);
  const int64_t per_block = static_cast<int64_t>(kThreads) * (vectors ? kVector : 1);
  const int64_t wanted = (args.walk.numel + per_block - 1) / per_block;
  const int64_t limit = 8 * static_cast<int64_t>(multiprocessors);
  return static_cast<unsigned>(wanted < limit ? wanted : limit);
}

}  // namespace taps::dev
