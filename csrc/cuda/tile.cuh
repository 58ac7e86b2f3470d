// The main loop of every tile kernel: C [rows, columns] += A [rows, depth] B [depth, columns] on the tensor cores, from
// a ring of shared stages that cp.async fills. A and B are operands.cuh's; sums in fp32, in an order that the grid
// alone decides.
//
// T is the type of the product's operands: bf16, f16, or float (rounded to tf32).
#pragma once

#include "cuda/operands.cuh"

namespace taps::dev {

// Shared memory that every architecture from sm_80 on gives a block (sm_86 and sm_89 give the least: 99 KiB).
constexpr unsigned kMostShared = 99 * 1024;

template <class S, class T, class A, class B>
struct Ring {
  static constexpr unsigned kBytesA = (A::kBytes + 15) / 16 * 16;
  static constexpr unsigned kBytesStage = (kBytesA + B::kBytes + 15) / 16 * 16;
  static constexpr int kFit = static_cast<int>(kMostShared / kBytesStage);
  static constexpr int kStages = kFit < S::kMostStages ? kFit : S::kMostStages;
  static constexpr unsigned kShared = kStages * kBytesStage;
  static_assert(kStages >= 2, "a tile whose stages do not fit");

  // sum = A B over the depths [begin, end); with slices, in the threads of the first.
  static TAPS_DEVICE void multiply(float (&sum)[S::kM][S::kN][4], A a, B b, int64_t begin, int64_t end) {
    // One question a step, the same for all threads, sends nearly all stages the short way.
    const int whole = a.whole() && b.whole() && end > begin ? static_cast<int>((end - begin) / S::kDepth) : 0;
    const int steps = end > begin ? static_cast<int>((end - begin + S::kDepth - 1) / S::kDepth) : 0;
    const int last = static_cast<int>(end - begin - static_cast<int64_t>(steps - 1) * S::kDepth);  // depth of the last
    const auto stage = [](int index) { return as<unsigned char>(arena(), static_cast<unsigned>(index) * kBytesStage); };
    const auto load = [&](int step, int into) {
      if (step < whole) {
        a.fetch_whole(stage(into));
        b.fetch_whole(as<unsigned char>(stage(into), kBytesA));
      } else if (step < steps) {
        const int depth = step + 1 == steps ? last : S::kDepth;
        a.fetch(stage(into), depth);
        b.fetch(as<unsigned char>(stage(into), kBytesA), depth);
      }
      cp_commit();  // empty groups too: the waits below count them
    };
    a.seek(begin);
    b.seek(begin);
    for (int step = 0; step < kStages - 1; ++step) load(step, step);
    int now = 0, next = kStages - 1;  // the stages that are used and filled, in a ring
    for (int step = 0; step < steps; ++step) {
      cp_wait<kStages - 2>();
      block_sync();  // what everyone fetched for this step is there, and the stage of the last step is free
      load(step + kStages - 1, next);
#pragma unroll
      for (unsigned within = 0; within < kPart; within += kMmaDepth<T>) {
        const unsigned k = S::slice() * kPart + within;
        uint32_t left[S::kM][4], right[S::kN][2];
        a.fragments(left, stage(now), k);
        b.fragments(right, as<unsigned char>(stage(now), kBytesA), k);
#pragma unroll
        for (int i = 0; i < S::kM; ++i) {
#pragma unroll
          for (int j = 0; j < S::kN; ++j) mma<T>(sum[i][j], left[i], right[j]);
        }
      }
      now = now + 1 == kStages ? 0 : now + 1;
      next = next + 1 == kStages ? 0 : next + 1;
    }
    cp_wait<0>();
    add_slices(sum);
  }

 private:
  static constexpr unsigned kPart = S::kDepth / S::kSlices;
  static_assert(S::kSlices == 1 || 16u * S::kM * S::kN * S::kThreadsOfSlice <= kShared, "room for a slice's sums");

  // The first slice's sums plus the second's, the third's, ...
  static TAPS_DEVICE void add_slices(float (&sum)[S::kM][S::kN][4]) {
    const sh<float> sums = as<float>(arena(), 0);
    const unsigned thread = tid() % S::kThreadsOfSlice;
    for (unsigned slice = 1; slice < S::kSlices; ++slice) {
      block_sync();  // the stages, or the sums of the slice before, have been read
      if (S::slice() == slice) {
        for_registers([&](unsigned i, unsigned j, unsigned e, unsigned at) {
          st(sums, at * S::kThreadsOfSlice + thread, sum[i][j][e]);
        });
      }
      block_sync();
      if (S::slice() == 0) {
        for_registers([&](unsigned i, unsigned j, unsigned e, unsigned at) {
          sum[i][j][e] += ld(sums, at * S::kThreadsOfSlice + thread);
        });
      }
    }
  }

  template <class Each>
  static TAPS_DEVICE void for_registers(const Each& each) {
#pragma unroll
    for (unsigned i = 0; i < S::kM; ++i) {
#pragma unroll
      for (unsigned j = 0; j < S::kN; ++j) {
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) each(i, j, e, (i * S::kN + j) * 4 + e);
      }
    }
  }
};

// Every pair of neighbours (row, column), (row, column + 1) of a warp's sums: its place, its number, the two values.
template <class S, class Each>
TAPS_DEVICE void for_pairs(const float (&sum)[S::kM][S::kN][4], const Each& each) {
#pragma unroll
  for (int i = 0; i < S::kM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        each(S::row() + 16 * i + 8 * half + lane() / 4, S::column() + 8 * j + 2 * (lane() % 4),
             static_cast<unsigned>((i * S::kN + j) * 2 + half), sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      }
    }
  }
}

}  // namespace taps::dev
