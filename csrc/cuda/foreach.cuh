// Many tensors by one launch: a chunk of one of them to a block, tensor after tensor.
#pragma once

#include "cuda/primitives.cuh"
#include "kernels.h"

namespace taps::dev {

constexpr int64_t kForeachChunk = 16384;  // elements to a block
static_assert(kForeachChunk == kDotChunk, "one partial sum to a block, as of a tensor alone");

struct Chunk {
  int item;
  int64_t begin, end;  // its elements
};

// This block's chunk. `Args` has `count` tensors, their `numel`, and `end`, where each one's blocks end.
template <class Args>
TAPS_DEVICE Chunk chunk_of(const Args& args) {
  const auto block = static_cast<int32_t>(bid_x());
  int item = 0, last = args.count - 1;  // the first one whose blocks end after this
  while (item < last) {
    const int middle = (item + last) / 2;
    if (block < args.end[middle]) {
      last = middle;
    } else {
      item = middle + 1;
    }
  }
  const int64_t begin = (block - (item > 0 ? args.end[item - 1] : 0)) * kForeachChunk, left = args.numel[item] - begin;
  return {item, begin, begin + (left < kForeachChunk ? left : kForeachChunk)};
}

// On the host: sets where each tensor's blocks end; returns how many there are.
template <class Args>
unsigned plan_foreach(Args& args) {
  int32_t blocks = 0;
  for (int i = 0; i < args.count; ++i) {
    blocks += static_cast<int32_t>((args.numel[i] + kForeachChunk - 1) / kForeachChunk);
    args.end[i] = blocks;
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace taps::dev
