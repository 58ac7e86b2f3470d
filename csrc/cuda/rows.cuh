// The forward of a gated linear layer for up to four rows, without tensor cores: W and Delta go from memory to
// registers, become W_t there, and are multiplied by fma in fp32. A warp takes two outputs, so that they share what it
// reads of x, and a slice of the depth. One definition for nvcc and for the twin; the launches are in linear.cu.
#pragma once

#include "cuda/gate.cuh"
#include "cuda/stream.cuh"

namespace taps::dev {

// Eight elements, which is what a lane takes at a time: of 16 bits in one access of 16 bytes, of 32 in two.
constexpr int kPiece = 8;
template <class E>
struct Piece {
  static constexpr int kVectors = kPiece * static_cast<int>(sizeof(E)) / 16;
  Vec16 part[kVectors];

  // All of them, 16-byte aligned: what is read once, or what other warps read, too.
  TAPS_DEVICE void stream(const E* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) part[i] = gld16_once(from + i * (kPiece / kVectors));
  }
  TAPS_DEVICE void share(const E* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) part[i] = reinterpret_cast<const Vec16*>(from)[i];
  }
  // Elements 2 k and 2 k + 1.
  TAPS_DEVICE Two<float> pair(int k) const {
    if constexpr (sizeof(E) == 4) {
      return {float_of(part[k / 2].word[k % 2 * 2]), float_of(part[k / 2].word[k % 2 * 2 + 1])};
    } else {
      const uint32_t word = part[0].word[k];
      return {to_f32(E{static_cast<uint16_t>(word)}), to_f32(E{static_cast<uint16_t>(word >> 16)})};
    }
  }
};

// Two elements, of which `left` are there, and zeros; kPairs: two of 16 bits are aligned, and both there or none.
template <bool kPairs, class E>
TAPS_DEVICE Two<float> two_of(const E* from, int64_t left) {
  Two<E> both{};
  if constexpr (kPairs && sizeof(E) == 2) {
    if (left > 0) both = *reinterpret_cast<const Two<E>*>(from);
  } else {
    if (left > 0) both.x = from[0];
    if (left > 1) both.y = from[1];
  }
  return {to_f32(both.x), to_f32(both.y)};
}

// How a block works on a product of few rows, whatever the types.
struct Warps {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kOutputs = 2;           // of a warp
  static constexpr int kStep = 32 * kPiece;    // elements that a warp takes of a row at a time
  static constexpr int64_t kLeastDepth = 512;  // of a slice: a step or two with all loads in flight
  static constexpr int64_t kAlign = 64;        // slices begin on whole lines of memory
  static constexpr int64_t kMostRows = 4;
};

// A product of up to kRows rows. Its order of sums: a lane's elements in turn, a warp's lanes pairwise, the slices of
// the depth first to last.
template <int kRows, class T, class W, class D>
struct Rows {
  using Tile = Warps;
  static constexpr int kWarps = Tile::kWarps, kOutputs = Tile::kOutputs, kStep = Tile::kStep;
  struct Loop {
    static constexpr unsigned kShared = 4 * kWarps * kOutputs * kRows;
  };

  static TAPS_DEVICE void run(const LinearProduct& p) {
    float sum[kOutputs][kRows] = {};
    const auto slices = static_cast<unsigned>(p.slices), groups = kWarps / slices;
    const unsigned group = warp() / slices, slice = warp() % slices;
    const int64_t first = static_cast<int64_t>(bid_x()) * groups * kOutputs;  // output of the block
    const int64_t output = first + group * kOutputs;
    const int64_t begin = slice * p.depth_of_split, last = begin + p.depth_of_split;
    const int64_t end = last < p.inputs ? last : p.inputs;
    if (output < p.outputs && begin < end) {
      if (is_open(p.gate)) {  // once, not in the loop
        multiply<true>(sum, p, output, begin, end);
      } else {
        multiply<false>(sum, p, output, begin, end);
      }
    }
    const sh<float> sums = as<float>(arena(), 0);  // of warps, outputs, rows
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) sum[o][m] += shfl_xor(sum[o][m], apart);
        if (lane() == 0) st(sums, (warp() * kOutputs + o) * kRows + m, sum[o][m]);
      }
    }
    block_sync();
    const unsigned across = groups * kOutputs;  // outputs of the block
    const unsigned o = tid() % across, m = tid() / across;
    if (m >= p.rows || first + o >= p.outputs) return;
    float total = 0.0f;
    for (unsigned s = 0; s < slices; ++s) {
      total += ld(sums, ((o / kOutputs * slices + s) * kOutputs + o % kOutputs) * kRows + m);
    }
    if (p.bias) total += to_f32(static_cast<const T*>(p.bias)[first + o]);
    static_cast<T*>(p.result)[m * p.ld_result + first + o] = from_f32<T>(total);
  }

 private:
  // Where a lane is. An output or row that is not there is read as the last one, and its sums are left.
  template <bool kOpen>
  struct Place {
    const T* x[kRows];
    const W* weight[kOutputs];
    const D* delta[kOutputs];
    int64_t left;  // elements of the slice from here on

    TAPS_DEVICE Place(const LinearProduct& p, int64_t output, int64_t begin, int64_t end) {
      const int64_t at = begin + lane() * kPiece;
      left = end - at;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int64_t row = m < p.rows ? m : p.rows - 1;
        x[m] = static_cast<const T*>(p.x.data) + row * p.x.ld + at;
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int64_t row = output + o < p.outputs ? output + o : p.outputs - 1;
        weight[o] = static_cast<const W*>(p.weight.data) + row * p.weight.ld + at;
        if constexpr (kOpen) delta[o] = static_cast<const D*>(p.delta.data) + row * p.delta.ld + at;
      }
    }
    TAPS_DEVICE void advance(int by) {
      left -= by;
#pragma unroll
      for (int m = 0; m < kRows; ++m) x[m] += by;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        weight[o] += by;
        if constexpr (kOpen) delta[o] += by;
      }
    }
  };

  template <bool kOpen>
  static TAPS_DEVICE void multiply(float (&sum)[kOutputs][kRows], const LinearProduct& p, int64_t output, int64_t begin,
                                   int64_t end) {
    // About eight loads in flight a lane.
    constexpr int kVectors = kOutputs * (Piece<W>::kVectors + (kOpen ? Piece<D>::kVectors : 0));
    constexpr int kTogether = kVectors < 8 ? 8 / kVectors : 1;
    const View<T> x(p.x);
    const View<W> weight(p.weight);
    const View<D> delta(p.delta);
    int piece = x.piece() < weight.piece() ? x.piece() : weight.piece();
    if (kOpen && delta.piece() < piece) piece = delta.piece();
    const bool even = piece >= 4 && p.inputs % 2 == 0;
    Place<kOpen> place(p, output, begin, end);
    int64_t at = begin;
    if (piece == 16 && p.inputs % kPiece == 0) {
      for (; at + kTogether * kStep <= end; at += kTogether * kStep) {
        step<true, kTogether>(sum, place);
        place.advance(kTogether * kStep);
      }
      if (at < end) step<false, kTogether>(sum, place);
    } else {
      for (; at < end; at += kStep) {
        if (even) {
          elements<true>(sum, place);
        } else {
          elements<false>(sum, place);
        }
        place.advance(kStep);
      }
    }
  }

  // Two numbers of W_t in a word.
  template <bool kOpen>
  static TAPS_DEVICE uint32_t weight_t(const Piece<W>& weight, const Piece<D>& delta, int k) {
    if constexpr (sizeof(W) == 2 && !kOpen) {
      return weight.part[0].word[k];
    } else if constexpr (sizeof(W) == 2 && sizeof(D) == 2) {
      return add2<T>(weight.part[0].word[k], delta.part[0].word[k]);
    } else {
      Two<float> both = weight.pair(k);
      if constexpr (kOpen) {
        const Two<float> change = delta.pair(k);
        both = {both.x + change.x, both.y + change.y};
      }
      return pack<T>(both.x, both.y);
    }
  }

  // Pieces of 16-byte accesses: with kWhole all are there, without it those before the slice's end.
  template <bool kWhole, int kTogether, bool kOpen>
  static TAPS_DEVICE void step(float (&sum)[kOutputs][kRows], const Place<kOpen>& place) {
    Piece<W> weight[kTogether][kOutputs];
    Piece<D> delta[kTogether][kOutputs];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const bool there = kWhole || place.left > u * kStep;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (!kWhole) weight[u][o] = {}, delta[u][o] = {};
        if (there) weight[u][o].stream(place.weight[o] + u * kStep);
        if constexpr (kOpen) {
          if (there) delta[u][o].stream(place.delta[o] + u * kStep);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      Piece<T> own[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int k = 0; k < kPiece / 2; ++k) own[o].part[0].word[k] = weight_t<kOpen>(weight[u][o], delta[u][o], k);
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        Piece<T> x;
        if (!kWhole) x = {};
        if (kWhole || place.left > u * kStep) x.share(place.x[m] + u * kStep);
#pragma unroll
        for (int k = 0; k < kPiece / 2; ++k) {
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) add(sum[o][m], x.pair(k), own[o].pair(k));
        }
      }
    }
  }

  // The same elements of a lane where they are not there in pieces, two by two: the others of a piece come from L1.
  template <bool kPairs, bool kOpen>
  static TAPS_DEVICE void elements(float (&sum)[kOutputs][kRows], const Place<kOpen>& place) {
#pragma unroll 1
    for (int k = 0; k < kPiece; k += 2) {
      const int64_t left = place.left - k;
      Two<float> own[kOutputs], x[kRows];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        own[o] = two_of<kPairs>(place.weight[o] + k, left);
        if constexpr (kOpen) {
          const Two<float> change = two_of<kPairs>(place.delta[o] + k, left);
          own[o] = {own[o].x + change.x, own[o].y + change.y};
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) x[m] = two_of<kPairs>(place.x[m] + k, left);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const Two<float> rounded{to_f32(from_f32<T>(own[o].x)), to_f32(from_f32<T>(own[o].y))};
#pragma unroll
        for (int m = 0; m < kRows; ++m) add(sum[o][m], x[m], rounded);
      }
    }
  }

  static TAPS_DEVICE void add(float& sum, const Two<float>& x, const Two<float>& weight) {
    sum += x.x * weight.x;
    sum += x.y * weight.y;
  }
};

}  // namespace taps::dev
