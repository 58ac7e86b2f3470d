// What the main loop multiplies: matrices as they lie in memory or turned, and weights W_t = round(W + g * Delta) that
// exist in registers alone. Each fetches its part of a stage and gives the fragments of an mma from it.
#pragma once

#include "cuda/stream.cuh"

namespace taps::dev {

// A matrix that is multiplied as it is: the part of a stage that holds it, and the fetching of that. It begins at row
// or column `first` of the side that is not the depth, which ends at `end`.
template <class S, class T, int kAlong, int kAcross, bool kTurned>
struct Side {
  static constexpr int kStride = stride_of<T, T>(kAcross, kTurned);
  static constexpr unsigned kBytes = kAlong * kStride * sizeof(T);
  Stream<S, T, kAlong, kAcross, kStride, kTurned> stream;

  TAPS_DEVICE Side(const Matrix& matrix, int64_t first, int64_t end) : stream(matrix, first, end) {}
  TAPS_DEVICE void seek(int64_t depth) { stream.seek(depth); }
  TAPS_DEVICE bool whole() const { return stream.whole(); }
  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) { stream.fetch_whole(as<T>(stage, 0)); }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) { stream.fetch(as<T>(stage, 0), depth); }
};

// --- left operands -----------------------------------------------------------------------------------------------

// The elements of a warp's rows from depth k on as an mma takes them, of a tile stored as [rows, depth].
template <class S, int kStride, class T>
TAPS_DEVICE void load_rows(uint32_t (&a)[S::kM][4], sh<T> tile, unsigned k) {
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

// A as it lies: [rows, depth]. `Fetched` is what fetches it.
template <class S, class T, class Fetched = Side<S, T, S::kRows, S::kDepth, false>>
struct Straight : Fetched {
  using Base = Fetched;
  using Base::Base;
  using Base::kStride;

  TAPS_DEVICE void fragments(uint32_t (&a)[S::kM][4], sh<unsigned char> stage, unsigned k) const {
    load_rows<S, kStride>(a, as<T>(stage, 0), k);
  }
};

// A stored as [depth, rows].
template <class S, class T, class Fetched = Side<S, T, S::kDepth, S::kRows, true>>
struct Turned : Fetched {
  using Base = Fetched;
  using Base::Base;
  using Base::kStride;

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

// The 16-bit elements of a warp's columns from depth k on as an mma takes them, of a tile stored as [columns, depth] or
// with kTurned as [depth, columns].
template <class S, int kStride, bool kTurned, class E>
TAPS_DEVICE void load_columns(uint32_t (&b)[S::kN][2], sh<E> tile, unsigned k) {
  if constexpr (S::kN % 2 == 0) {
#pragma unroll
    for (int j = 0; j < S::kN; j += 2) {
      const unsigned first = S::column() + 8 * j;
      uint32_t both[4];
      if constexpr (kTurned) {
        ldsm_x4_t(both, tile, (k + lane() % 16) * kStride + first + lane() / 16 * 8);
      } else {
        ldsm_x4(both, tile, (first + lane() / 16 * 8 + lane() % 8) * kStride + k + lane() / 8 % 2 * 8);
      }
      b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
  } else {
    static_assert(!kTurned, "turned operands: two tiles of columns to one ldmatrix");
#pragma unroll
    for (int j = 0; j < S::kN; ++j) {
      const unsigned at = (S::column() + 8 * j + lane() / 4) * kStride + k + lane() % 4 * 2;
      const Two<E> low = ld2(tile, at), high = ld2(tile, at + 8);
      b[j][0] = low.x.bits | static_cast<uint32_t>(low.y.bits) << 16;
      b[j][1] = high.x.bits | static_cast<uint32_t>(high.y.bits) << 16;
    }
  }
}

// B as it lies: [depth, columns].
template <class S, class T, class Fetched = Side<S, T, S::kDepth, S::kColumns, true>>
struct Plain : Fetched {
  using Base = Fetched;
  using Base::Base;
  using Base::kStride;
  static_assert(S::kN % 2 == 0, "two tiles of columns to one ldmatrix");

  TAPS_DEVICE void fragments(uint32_t (&b)[S::kN][2], sh<unsigned char> stage, unsigned k) const {
    const sh<T> tile = as<T>(stage, 0);
    if constexpr (sizeof(T) == 2) {
      load_columns<S, kStride, true>(b, tile, k);
    } else {
#pragma unroll
      for (int j = 0; j < S::kN; ++j) {
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned at = (k + lane() % 4 + half * 4) * kStride + S::column() + 8 * j + lane() / 4;
          b[j][half] = to_tf32(ld(tile, at));
        }
      }
    }
  }
};

// B = W_t: stored as [columns, depth], or with kTurned as [depth, columns]. W has type W, Delta type D. A closed gate
// (kOpen is false) fetches no byte of Delta; where W already has the type T its bits go through as they are.
template <class S, class T, class W, class D, bool kTurned, bool kOpen>
struct Gated {
  static constexpr int kAlong = kTurned ? S::kDepth : S::kColumns, kAcross = kTurned ? S::kColumns : S::kDepth;
  static constexpr int kStrideW = stride_of<T, W>(kAcross, kTurned), kStrideD = stride_of<T, D>(kAcross, kTurned);
  static constexpr unsigned kBytesW = kAlong * kStrideW * sizeof(W);
  static constexpr unsigned kBytes = kBytesW + (kOpen ? kAlong * kStrideD * sizeof(D) : 0);
  Stream<S, W, kAlong, kAcross, kStrideW, kTurned> weight;
  Stream<S, D, kAlong, kAcross, kStrideD, kTurned> delta;

  TAPS_DEVICE Gated(const Matrix& w, const Matrix& d, int64_t column, int64_t column_end)
      : weight(w, column, column_end), delta(d, column, column_end) {}

  TAPS_DEVICE void seek(int64_t depth) {
    weight.seek(depth);
    if constexpr (kOpen) delta.seek(depth);
  }
  TAPS_DEVICE bool whole() const { return weight.whole() && (!kOpen || delta.whole()); }
  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) {
    weight.fetch_whole(as<W>(stage, 0));
    if constexpr (kOpen) delta.fetch_whole(as<D>(stage, kBytesW));
  }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) {
    weight.fetch(as<W>(stage, 0), depth);
    if constexpr (kOpen) delta.fetch(as<D>(stage, kBytesW), depth);
  }

  // Element (k, column) of a stage; for 16-bit T with the next one along the depth.
  template <int kStride, class E>
  static TAPS_DEVICE float one(sh<E> tile, unsigned k, unsigned column) {
    return to_f32(ld(tile, kTurned ? k * kStride + column : column * kStride + k));
  }
  template <int kStride, class E>
  static TAPS_DEVICE Two<float> two(sh<E> tile, unsigned k, unsigned column) {
    if constexpr (kTurned) {
      return {one<kStride>(tile, k, column), one<kStride>(tile, k + 1, column)};
    } else {
      const Two<E> both = ld2(tile, column * kStride + k);
      return {to_f32(both.x), to_f32(both.y)};
    }
  }

  TAPS_DEVICE void fragments(uint32_t (&b)[S::kN][2], sh<unsigned char> stage, unsigned k) const {
    const sh<W> w = as<W>(stage, 0);
    const sh<D> d = as<D>(stage, kBytesW);
    if constexpr (sizeof(W) == 2) load_columns<S, kStrideW, kTurned>(b, w, k);
    if constexpr (sizeof(W) == 2 && !kOpen) return;
    if constexpr (kOpen && sizeof(W) == 2 && sizeof(D) == 2) {
      uint32_t change[S::kN][2];
      load_columns<S, kStrideD, kTurned>(change, d, k);
#pragma unroll
      for (int j = 0; j < S::kN; ++j) {
        b[j][0] = add2<T>(b[j][0], change[j][0]);
        b[j][1] = add2<T>(b[j][1], change[j][1]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < S::kN; ++j) {
#pragma unroll
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned column = S::column() + 8 * j + lane() / 4;
          if constexpr (sizeof(T) == 4) {
            const unsigned at = k + lane() % 4 + half * 4;
            const float own = one<kStrideW>(w, at, column);
            b[j][half] = to_tf32(kOpen ? own + one<kStrideD>(d, at, column) : own);
          } else {
            const unsigned at = k + lane() % 4 * 2 + half * 8;
            Two<float> sum;
            if constexpr (sizeof(W) == 2) {
              sum = {to_f32(T{static_cast<uint16_t>(b[j][half])}), to_f32(T{static_cast<uint16_t>(b[j][half] >> 16)})};
            } else {
              sum = two<kStrideW>(w, at, column);
            }
            if constexpr (kOpen) {
              const Two<float> change = two<kStrideD>(d, at, column);
              sum = {sum.x + change.x, sum.y + change.y};
            }
            b[j][half] = pack<T>(sum.x, sum.y);
          }
        }
      }
    }
  }
};

}  // namespace taps::dev
