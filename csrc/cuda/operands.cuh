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
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) { stream.fetch(as<T>(stage, 0), depth); }
};

// --- left operands -----------------------------------------------------------------------------------------------

// A as it lies: [rows, depth].
template <class S, class T>
struct Straight : Side<S, T, S::kRows, S::kDepth, false> {
  using Base = Side<S, T, S::kRows, S::kDepth, false>;
  using Base::Base;
  using Base::kStride;

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
struct Turned : Side<S, T, S::kDepth, S::kRows, true> {
  using Base = Side<S, T, S::kDepth, S::kRows, true>;
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

// B as it lies: [depth, columns].
template <class S, class T>
struct Plain : Side<S, T, S::kDepth, S::kColumns, true> {
  using Base = Side<S, T, S::kDepth, S::kColumns, true>;
  using Base::Base;
  using Base::kStride;
  static_assert(S::kN % 2 == 0, "two tiles of columns to one ldmatrix");

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

}  // namespace taps::dev
