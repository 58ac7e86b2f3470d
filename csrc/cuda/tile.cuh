// The main loop of every tile kernel: C [rows, columns] += A [rows, depth] B [depth, columns] on the tensor cores, from
// a ring of shared stages that cp.async fills. Where A and B come from are its operands: matrices as they lie in memory
// or turned, and weights W_t = round(W + g * Delta) that exist in registers alone. Any size, leading dimension and
// alignment; sums in fp32, in an order that the shape alone decides.
//
// T is the type of the product's operands: bf16, f16, or float (rounded to tf32).
#pragma once

#include "cuda/primitives.cuh"
#include "kernels.h"

namespace taps::dev {

// What a block computes, how its warps share it, how deep a stage is, and how many stages it would like. With slices,
// groups of warps take turns along the depth of every stage, and their sums are added in the end: more warps to hide the
// latency of few rows behind, without another pass over memory.
template <int kRows_, int kColumns_, int kDepth_, int kWarpsM_, int kWarpsN_, int kMostStages_, int kSlices_ = 1>
struct Shape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_, kMostStages = kMostStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kSlices = kSlices_;
  static constexpr int kThreadsOfSlice = 32 * kWarpsM * kWarpsN, kThreads = kThreadsOfSlice * kSlices;
  static constexpr int kM = kRows / kWarpsM / 16, kN = kColumns / kWarpsN / 8;  // tiles of 16 x 8 to a warp
  static_assert(kM * 16 * kWarpsM == kRows && kN * 8 * kWarpsN == kColumns, "warps that share the tile evenly");
  static_assert(kDepth % (16 * kSlices) == 0, "slices of whole mma steps");

  static TAPS_DEVICE unsigned slice() { return warp() / (kWarpsM * kWarpsN); }
  static TAPS_DEVICE unsigned row() { return warp() / kWarpsN % kWarpsM * kM * 16; }  // where the warp's part begins
  static TAPS_DEVICE unsigned column() { return warp() % kWarpsN * kN * 8; }
};

// How deep one mma goes, and the neighbours along the depth that a register of its operands holds.
template <class T>
constexpr unsigned kMmaDepth = sizeof(T) == 2 ? 16 : 8;

// Elements between rows of a stage, `across` of them used. The padding puts what a warp reads together into different
// banks: eight rows (or, of turned operands, four pairs of rows) times four words.
template <class T, class E>
constexpr int stride_of(int across, bool turned) {
  return across + (turned ? (sizeof(T) == 2 && sizeof(E) == 4 ? 4 : 8) : (sizeof(T) == 2 ? 8 : 4));
}

// A matrix in global memory; rows are `ld` elements apart.
template <class E>
struct View {
  const E* data;
  int64_t ld;

  TAPS_DEVICE View(const Matrix& matrix) : data(static_cast<const E*>(matrix.data)), ld(matrix.ld) {}

  // The largest piece, in bytes, that every row can be read in.
  TAPS_DEVICE int piece() const {
    const auto bits = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(ld) * sizeof(E);
    return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : static_cast<int>(sizeof(E));
  }
};

// kAlong x kAcross elements of a matrix from (row, column) into a stage, zero outside [row_end, column_end): pieces of
// 16 or 4 bytes go by cp.async, single elements (rows that begin at odd 16-bit elements) through registers.
template <class S, class E, int kAlong, int kAcross, int kStride>
struct Fetch {
  template <int kBytes>
  static TAPS_DEVICE void pieces(sh<E> tile, View<E> from, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
    constexpr int kPiece = kBytes / static_cast<int>(sizeof(E));
    constexpr unsigned kPieces = kAcross / kPiece;
    for (unsigned i = tid(); i < kAlong * kPieces; i += S::kThreads) {
      const int64_t r = row + i / kPieces, c = column + i % kPieces * kPiece;
      const unsigned to = i / kPieces * kStride + i % kPieces * kPiece;
      const int64_t left = r < row_end ? column_end - c : 0;
      const int count = left >= kPiece ? kPiece : (left > 0 ? static_cast<int>(left) : 0);
      const E* const source = count > 0 ? from.data + r * from.ld + c : from.data;
      if constexpr (kBytes >= 4) {
        cp_async<kBytes>(tile, to, source, static_cast<unsigned>(count * sizeof(E)));
      } else {
        st(tile, to, count > 0 ? *source : E{});
      }
    }
  }

  static TAPS_DEVICE void run(sh<E> tile, View<E> from, int piece, int64_t row, int64_t row_end, int64_t column,
                              int64_t column_end) {
    if (piece == 16) {
      pieces<16>(tile, from, row, row_end, column, column_end);
    } else if (piece == 4) {
      pieces<4>(tile, from, row, row_end, column, column_end);
    } else {
      pieces<sizeof(E)>(tile, from, row, row_end, column, column_end);
    }
  }
};

// --- left operands -----------------------------------------------------------------------------------------------

// A as it lies: [rows, depth].
template <class S, class T>
struct Straight {
  static constexpr int kStride = stride_of<T, T>(S::kDepth, false);
  static constexpr unsigned kBytes = S::kRows * kStride * sizeof(T);
  View<T> from;
  int64_t row, row_end;
  int piece;

  TAPS_DEVICE Straight(const Matrix& matrix, int64_t row, int64_t row_end)
      : from(matrix), row(row), row_end(row_end), piece(from.piece()) {}

  TAPS_DEVICE void fetch(sh<unsigned char> stage, int64_t k, int64_t k_end) const {
    Fetch<S, T, S::kRows, S::kDepth, kStride>::run(as<T>(stage, 0), from, piece, row, row_end, k, k_end);
  }

  TAPS_DEVICE void fragments(uint32_t (&a)[S::kM][4], sh<unsigned char> stage, unsigned k) const {
    const sh<T> tile = as<T>(stage, 0);
#pragma unroll
    for (int i = 0; i < S::kM; ++i) {
      const unsigned first = S::row() + 16 * i;
      if constexpr (sizeof(T) == 2) {
        ldsm_x4(a[i], tile, (first + lane() % 16) * kStride + k + lane() / 16 * 8);
      } else {
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) {
          a[i][e] = to_tf32(ld(tile, (first + lane() / 4 + e % 2 * 8) * kStride + k + lane() % 4 + e / 2 * 4));
        }
      }
    }
  }
};

// A stored as [depth, rows].
template <class S, class T>
struct Turned {
  static constexpr int kStride = stride_of<T, T>(S::kRows, true);
  static constexpr unsigned kBytes = S::kDepth * kStride * sizeof(T);
  View<T> from;
  int64_t row, row_end;
  int piece;

  TAPS_DEVICE Turned(const Matrix& matrix, int64_t row, int64_t row_end)
      : from(matrix), row(row), row_end(row_end), piece(from.piece()) {}

  TAPS_DEVICE void fetch(sh<unsigned char> stage, int64_t k, int64_t k_end) const {
    Fetch<S, T, S::kDepth, S::kRows, kStride>::run(as<T>(stage, 0), from, piece, k, k_end, row, row_end);
  }

  TAPS_DEVICE void fragments(uint32_t (&a)[S::kM][4], sh<unsigned char> stage, unsigned k) const {
    const sh<T> tile = as<T>(stage, 0);
#pragma unroll
    for (int i = 0; i < S::kM; ++i) {
      const unsigned first = S::row() + 16 * i;
      if constexpr (sizeof(T) == 2) {
        ldsm_x4_t(a[i], tile, (k + lane() / 16 * 8 + lane() % 8) * kStride + first + lane() / 8 % 2 * 8);
      } else {
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) {
          a[i][e] = to_tf32(ld(tile, (k + lane() % 4 + e / 2 * 4) * kStride + first + lane() / 4 + e % 2 * 8));
        }
      }
    }
  }
};

// --- right operands ----------------------------------------------------------------------------------------------

// B as it lies: [depth, columns].
template <class S, class T>
struct Plain {
  static constexpr int kStride = stride_of<T, T>(S::kColumns, true);
  static constexpr unsigned kBytes = S::kDepth * kStride * sizeof(T);
  static_assert(S::kN % 2 == 0, "two tiles of columns to one ldmatrix");
  View<T> from;
  int64_t column, column_end;
  int piece;

  TAPS_DEVICE Plain(const Matrix& matrix, int64_t column, int64_t column_end)
      : from(matrix), column(column), column_end(column_end), piece(from.piece()) {}

  TAPS_DEVICE void fetch(sh<unsigned char> stage, int64_t k, int64_t k_end) const {
    Fetch<S, T, S::kDepth, S::kColumns, kStride>::run(as<T>(stage, 0), from, piece, k, k_end, column, column_end);
  }

  TAPS_DEVICE void fragments(uint32_t (&b)[S::kN][2], sh<unsigned char> stage, unsigned k) const {
    const sh<T> tile = as<T>(stage, 0);
#pragma unroll
    for (int j = 0; j < S::kN; j += 2) {
      const unsigned first = S::column() + 8 * j;
      if constexpr (sizeof(T) == 2) {
        uint32_t both[4];
        ldsm_x4_t(both, tile, (k + lane() % 16) * kStride + first + lane() / 16 * 8);
        b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
      } else {
#pragma unroll
        for (unsigned e = 0; e < 4; ++e) {
          const unsigned at = (k + lane() % 4 + e % 2 * 4) * kStride + first + e / 2 * 8 + lane() / 4;
          b[j + e / 2][e % 2] = to_tf32(ld(tile, at));
        }
      }
    }
  }
};

// B = W_t: stored as [columns, depth], or with kTurned as [depth, columns]. W has type W, Delta type D. A closed gate
// reads no byte of Delta; where W already has the type T its bits go through as they are.
template <class S, class T, class W, class D, bool kTurned>
struct Gated {
  static constexpr int kAlong = kTurned ? S::kDepth : S::kColumns, kAcross = kTurned ? S::kColumns : S::kDepth;
  static constexpr int kStrideW = stride_of<T, W>(kAcross, kTurned), kStrideD = stride_of<T, D>(kAcross, kTurned);
  static constexpr unsigned kBytesW = kAlong * kStrideW * sizeof(W);
  static constexpr unsigned kBytes = kBytesW + kAlong * kStrideD * sizeof(D);
  View<W> weight;
  View<D> delta;
  int64_t column, column_end;
  int piece_w, piece_d;
  bool open;

  TAPS_DEVICE Gated(const Matrix& w, const Matrix& d, bool open, int64_t column, int64_t column_end)
      : weight(w), delta(d), column(column), column_end(column_end), piece_w(weight.piece()),
        piece_d(delta.piece()), open(open) {}

  TAPS_DEVICE void fetch(sh<unsigned char> stage, int64_t k, int64_t k_end) const {
    const int64_t row = kTurned ? k : column, row_end = kTurned ? k_end : column_end;
    const int64_t from = kTurned ? column : k, to = kTurned ? column_end : k_end;
    Fetch<S, W, kAlong, kAcross, kStrideW>::run(as<W>(stage, 0), weight, piece_w, row, row_end, from, to);
    if (open) Fetch<S, D, kAlong, kAcross, kStrideD>::run(as<D>(stage, kBytesW), delta, piece_d, row, row_end, from, to);
  }

  // A register of B: element (k, column) of the stage, and for 16-bit types the next one along the depth.
  TAPS_DEVICE uint32_t element(sh<W> w, sh<D> d, unsigned k, unsigned column) const {
    const unsigned at_w = kTurned ? k * kStrideW + column : column * kStrideW + k;
    const unsigned at_d = kTurned ? k * kStrideD + column : column * kStrideD + k;
    if constexpr (sizeof(T) == 4) {
      return to_tf32(open ? to_f32(ld(w, at_w)) + to_f32(ld(d, at_d)) : to_f32(ld(w, at_w)));
    } else {
      Two<W> own;
      if constexpr (kTurned) {
        own = {ld(w, at_w), ld(w, at_w + kStrideW)};
      } else {
        own = ld2(w, at_w);
      }
      if (!open) {
        if constexpr (sizeof(W) == 2) {
          return own.x.bits | static_cast<uint32_t>(own.y.bits) << 16;
        } else {
          return pack<T>(own.x, own.y);
        }
      }
      Two<D> change;
      if constexpr (kTurned) {
        change = {ld(d, at_d), ld(d, at_d + kStrideD)};
      } else {
        change = ld2(d, at_d);
      }
      return pack<T>(to_f32(own.x) + to_f32(change.x), to_f32(own.y) + to_f32(change.y));
    }
  }

  TAPS_DEVICE void fragments(uint32_t (&b)[S::kN][2], sh<unsigned char> stage, unsigned k) const {
    constexpr unsigned kHalf = kMmaDepth<T> / 2;
    const sh<W> w = as<W>(stage, 0);
    const sh<D> d = as<D>(stage, kBytesW);
    const unsigned inner = k + lane() % 4 * (sizeof(T) == 2 ? 2 : 1);
#pragma unroll
    for (int j = 0; j < S::kN; ++j) {
      const unsigned own = S::column() + 8 * j + lane() / 4;
      b[j][0] = element(w, d, inner, own);
      b[j][1] = element(w, d, inner + kHalf, own);
    }
  }
};

// --- the loop ----------------------------------------------------------------------------------------------------

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
  static TAPS_DEVICE void multiply(float (&sum)[S::kM][S::kN][4], const A& a, const B& b, int64_t begin, int64_t end) {
    const int64_t steps = end > begin ? (end - begin + S::kDepth - 1) / S::kDepth : 0;
    const auto stage_of = [](int64_t step) { return as<unsigned char>(arena(), static_cast<unsigned>(step % kStages) * kBytesStage); };
    const auto load = [&](int64_t step) {
      if (step < steps) {
        const int64_t k = begin + step * S::kDepth;
        a.fetch(stage_of(step), k, end);
        b.fetch(as<unsigned char>(stage_of(step), kBytesA), k, end);
      }
      cp_commit();  // empty groups too: the waits below count them
    };
    for (int64_t step = 0; step < kStages - 1; ++step) load(step);
    for (int64_t step = 0; step < steps; ++step) {
      cp_wait<kStages - 2>();
      block_sync();  // what everyone fetched for this step is there, and the stage of the last step is free
      load(step + kStages - 1);
      const sh<unsigned char> stage = stage_of(step);
#pragma unroll
      for (unsigned within = 0; within < kPart; within += kMmaDepth<T>) {
        const unsigned k = S::slice() * kPart + within;
        uint32_t left[S::kM][4], right[S::kN][2];
        a.fragments(left, stage, k);
        b.fragments(right, as<unsigned char>(stage, kBytesA), k);
#pragma unroll
        for (int i = 0; i < S::kM; ++i) {
#pragma unroll
          for (int j = 0; j < S::kN; ++j) mma<T>(sum[i][j], left[i], right[j]);
        }
      }
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

// Every pair of neighbours (row, column), (row, column + 1) of a warp's sums, with the two values.
template <class S, class Each>
TAPS_DEVICE void for_pairs(const float (&sum)[S::kM][S::kN][4], const Each& each) {
#pragma unroll
  for (int i = 0; i < S::kM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        each(S::row() + 16 * i + 8 * half + lane() / 4, S::column() + 8 * j + 2 * (lane() % 4), sum[i][j][2 * half],
             sum[i][j][2 * half + 1]);
      }
    }
  }
}

}  // namespace taps::dev
