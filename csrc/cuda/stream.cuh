// What a tile is made of before anything is multiplied: its shape, how its stages lie in shared memory, and how a
// thread fetches its part of a matrix, stage after stage. Any size, leading dimension and alignment.
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
// them, take a way of a few instructions (fetch_whole): few rows leave no more time than that.
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

  // Whether stages that are wholly there can be fetched by fetch_whole. Turned, that is where the other side is, too.
  TAPS_DEVICE bool whole() const { return piece_ == 16 && (!kTurned || left_ == kAcross); }
  TAPS_DEVICE void fetch_whole(sh<E> tile) {
    using Mine = Share<16>;
    const int row = Mine::row(), column = Mine::column();
#pragma unroll
    for (int pass = 0; pass < Mine::kPasses; ++pass) {
      const int r = row + pass * Mine::kPass;
      if (Mine::idle(r)) break;
      cp_async<16>(tile, static_cast<unsigned>(r * kStride + column), next_ + pass * Mine::kPass * ld_,
                   kTurned || r < left_ ? 16u : 0u);
    }
    next_ += kTurned ? kDepth * ld_ : kDepth;
  }

  // The next stage, of which `depth` is left.
  TAPS_DEVICE void fetch(sh<E> tile, int depth) {
    if (piece_ == 16) {
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

}  // namespace taps::dev
