// The main loop of every tile kernel: C [rows, columns] += A [rows, depth] B [depth, columns] on the tensor cores, from
// a ring of shared stages that cp.async fills. Where A and B come from are its operands: matrices as they lie in memory
// or turned, and weights W_t = round(W + g * Delta) that exist in registers alone. Any size, leading dimension and
// alignment; sums in fp32, in an order that the grid alone decides.
//
// T is the type of the product's operands: bf16, f16, or float (rounded to tf32).
#pragma once

#include "cuda/primitives.cuh"
#include "kernels.h"

namespace taps::dev {

// What a block computes, how its warps share it, how deep a stage is, and how many stages it would like. With slices,
// groups of warps take turns along the depth of every stage, and their sums are added in the end: more warps to hide
// the latency of few rows behind, without another pass over memory.
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
  // Whether elements at even columns can be read and written together with the next.
  TAPS_DEVICE bool even() const {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(ld) * sizeof(E)) % (2 * sizeof(E)) == 0;
  }
};

// What a thread fetches of an operand, stage after stage: kAlong rows of kAcross elements, zero outside the matrix. The
// depth runs across the rows, or with kTurned down them. Pieces of 16 or 4 bytes go by cp.async, single elements (rows
// that begin at odd 16-bit elements) through registers. Whole stages of pieces of 16 bytes, which is nearly all of
// them, take a way of a few instructions: few rows leave no more time than that.
template <class S, class E, int kAlong, int kAcross, int kStride, bool kTurned>
class Stream {
 public:
  // The other side of the operand, its rows or columns, begins at `first` and ends at `end`.
  TAPS_DEVICE Stream(const View<E>& from, int64_t first, int64_t end) : data_(from.data), ld_(from.ld) {
    const int64_t left = end - first;
    left_ = left < (kTurned ? kAcross : kAlong) ? static_cast<int>(left) : (kTurned ? kAcross : kAlong);
    piece_ = from.piece();
    const unsigned pieces = kAcross * sizeof(E) / static_cast<unsigned>(piece_);
    const int64_t row = tid() / pieces, column = tid() % pieces * (piece_ / static_cast<int>(sizeof(E)));
    next_ = data_;
    if (data_) next_ += kTurned ? row * ld_ + first + column : (first + row) * ld_ + column;  // a closed Delta has none
  }

  TAPS_DEVICE void seek(int64_t depth) {
    if (data_) next_ += kTurned ? depth * ld_ : depth;
  }

  // The next stage, of which `depth` is left.
  TAPS_DEVICE void fetch(sh<E> tile, int depth) {
    if (piece_ == 16 && depth == kDepth) {
      whole(tile);
    } else if (piece_ == 16) {
      pieces<16>(tile, depth);
    } else if (piece_ == 4) {
      pieces<4>(tile, depth);
    } else {
      pieces<sizeof(E)>(tile, depth);
    }
    next_ += kTurned ? kDepth * ld_ : kDepth;
  }

 private:
  static constexpr int kDepth = kTurned ? kAlong : kAcross;

  // How `kBytes` pieces are shared: pass after pass, in which all threads fetch kPass rows.
  template <int kBytes>
  struct Share {
    static constexpr int kPiece = kBytes / static_cast<int>(sizeof(E)), kPieces = kAcross / kPiece;
    static constexpr int kPass = S::kThreads / kPieces, kPasses = (kAlong + kPass - 1) / kPass;
    static_assert(kPass * kPieces == S::kThreads, "rows shared evenly by the threads");
    static TAPS_DEVICE int row() { return static_cast<int>(tid()) / kPieces; }
    static TAPS_DEVICE int column() { return static_cast<int>(tid()) % kPieces * kPiece; }
    // Whether there are more threads than pieces, and this one has none.
    static TAPS_DEVICE bool idle(int row) { return kAlong % kPass != 0 && row >= kAlong; }
    static TAPS_DEVICE int count(int left) { return left >= kPiece ? kPiece : (left > 0 ? left : 0); }
  };

  TAPS_DEVICE void whole(sh<E> tile) const {
    using Mine = Share<16>;
    const int row = Mine::row(), column = Mine::column();
    const int count = kTurned ? Mine::count(left_ - column) : Mine::kPiece;
#pragma unroll
    for (int pass = 0; pass < Mine::kPasses; ++pass) {
      const int r = row + pass * Mine::kPass;
      if (Mine::idle(r)) break;
      const unsigned bytes = kTurned || r < left_ ? static_cast<unsigned>(count * sizeof(E)) : 0u;
      cp_async<16>(tile, static_cast<unsigned>(r * kStride + column), next_ + pass * Mine::kPass * ld_, bytes);
    }
  }

  template <int kBytes>
  TAPS_DEVICE void pieces(sh<E> tile, int depth) const {
    using Mine = Share<kBytes>;
    const int row = Mine::row(), column = Mine::column();
    const int rows = kTurned ? depth : left_, count = Mine::count((kTurned ? left_ : depth) - column);
#pragma unroll
    for (int pass = 0; pass < Mine::kPasses; ++pass) {
      const int r = row + pass * Mine::kPass;
      if (Mine::idle(r)) break;
      const bool there = r < rows && count > 0;
      const E* const from = there ? next_ + pass * Mine::kPass * ld_ : data_;
      const unsigned to = static_cast<unsigned>(r * kStride + column);
      if constexpr (kBytes >= 4) {
        cp_async<kBytes>(tile, to, from, there ? static_cast<unsigned>(count * sizeof(E)) : 0u);
      } else {
        st(tile, to, there ? *from : E{});
      }
    }
  }

  const E* data_;
  const E* next_;  // this thread's first piece of the next stage
  int64_t ld_;
  int piece_, left_;
};

// --- left operands -----------------------------------------------------------------------------------------------

// A as it lies: [rows, depth].
template <class S, class T>
struct Straight {
  static constexpr int kStride = stride_of<T, T>(S::kDepth, false);
  static constexpr unsigned kBytes = S::kRows * kStride * sizeof(T);
  Stream<S, T, S::kRows, S::kDepth, kStride, false> stream;

  TAPS_DEVICE Straight(const Matrix& matrix, int64_t row, int64_t row_end) : stream(matrix, row, row_end) {}

  TAPS_DEVICE void seek(int64_t depth) { stream.seek(depth); }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) { stream.fetch(as<T>(stage, 0), depth); }

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
  Stream<S, T, S::kDepth, S::kRows, kStride, true> stream;

  TAPS_DEVICE Turned(const Matrix& matrix, int64_t row, int64_t row_end) : stream(matrix, row, row_end) {}

  TAPS_DEVICE void seek(int64_t depth) { stream.seek(depth); }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) { stream.fetch(as<T>(stage, 0), depth); }

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
  Stream<S, T, S::kDepth, S::kColumns, kStride, true> stream;

  TAPS_DEVICE Plain(const Matrix& matrix, int64_t column, int64_t column_end) : stream(matrix, column, column_end) {}

  TAPS_DEVICE void seek(int64_t depth) { stream.seek(depth); }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) { stream.fetch(as<T>(stage, 0), depth); }

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
  Stream<S, W, kAlong, kAcross, kStrideW, kTurned> weight;
  Stream<S, D, kAlong, kAcross, kStrideD, kTurned> delta;
  bool open;

  TAPS_DEVICE Gated(const Matrix& w, const Matrix& d, bool open, int64_t column, int64_t column_end)
      : weight(w, column, column_end), delta(d, column, column_end), open(open) {}

  TAPS_DEVICE void seek(int64_t depth) {
    weight.seek(depth);
    delta.seek(depth);
  }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) {
    weight.fetch(as<W>(stage, 0), depth);
    if (open) delta.fetch(as<D>(stage, kBytesW), depth);
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
  static TAPS_DEVICE void multiply(float (&sum)[S::kM][S::kN][4], A a, B b, int64_t begin, int64_t end) {
    const int steps = end > begin ? static_cast<int>((end - begin + S::kDepth - 1) / S::kDepth) : 0;
    const int last = static_cast<int>(end - begin - static_cast<int64_t>(steps - 1) * S::kDepth);  // depth of the last
    const auto stage = [](int index) { return as<unsigned char>(arena(), static_cast<unsigned>(index) * kBytesStage); };
    const auto load = [&](int step, int into) {
      if (step < steps) {
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
