// Sums over the threads of a block, in an order of their own: the same bits every time.
#pragma once

#include "cuda/elements.cuh"

namespace taps::dev {

// The sum over a block in a fixed tree, in every thread. T has 8 bytes; it takes as many of shared memory for each of
// kThreads threads.
template <class T>
TAPS_DEVICE T block_sum(T value) {
  const sh<T> sums = as<T>(arena(), 0);
  st(sums, tid(), value);
  block_sync();
#pragma unroll
  for (unsigned width = kThreads / 2; width > 0; width /= 2) {
    if (tid() < width) st(sums, tid(), ld(sums, tid()) + ld(sums, tid() + width));
    block_sync();
  }
  return ld(sums, 0);
}

// The sum of the counts, 15 at most, of the threads before this one; `all` becomes that of the block. `sums`: room for
// a number of each warp, which nobody has read since the last barrier.
TAPS_DEVICE unsigned sum_before(unsigned count, sh<uint32_t> sums, unsigned& all) {
  const uint32_t earlier = (1u << lane()) - 1;  // lanes
  unsigned before = 0, of_warp = 0;
#pragma unroll
  for (unsigned bit = 0; bit < 4; ++bit) {
    const uint32_t votes = ballot((count >> bit & 1) != 0);
    before += popcount(votes & earlier) << bit;
    of_warp += popcount(votes) << bit;
  }
  if (lane() == 0) st(sums, warp(), of_warp);
  block_sync();
  all = 0;
  for (unsigned other = 0; other < nthreads() / 32; ++other) {
    const unsigned theirs = ld(sums, other);
    if (other < warp()) before += theirs;
    all += theirs;
  }
  return before;
}

}  // namespace taps::dev
