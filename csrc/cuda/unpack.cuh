// W_t = W + g * Delta of a packed Delta, which is decoded in registers. Bound by memory, as reconstruct.cuh is: a
// thread takes eight elements at a time, so that their bits are a byte and their codes have one scale. One definition
// for nvcc and for the twin; the launches are in unpack.cu.
//
// Of a bitmask a block must know how many values come before its elements. One launch counts the bits of each chunk,
// and in the next one every block adds up the chunks before its own, then goes through it tile by tile.
#pragma once

#include "cuda/block.cuh"
#include "cuda/reconstruct.cuh"

namespace taps::dev {

constexpr unsigned kCountShared = kThreads * sizeof(int64_t);
constexpr unsigned kSumsOfWarps = kThreads / 32;
constexpr unsigned kBitmaskShared = kCountShared + 2 * kSumsOfWarps * sizeof(uint32_t);
static_assert(kUnpackTile == kThreads * kVector, "a byte of bits for each thread");

TAPS_BOTH inline bool takes_vectors(const Unpack& args) {
  return aligned(args.out) && aligned(args.weight) && (reinterpret_cast<uintptr_t>(args.delta.codes) & 7) == 0;
}

// Elements [at, at + count) of the Delta. Of a bitmask `rank` values come before them. The host has not seen its bits,
// which would be to wait for the device: where there are more of them than values, they stand for zeros.
TAPS_DEVICE void decode(const PackedDelta& delta, int64_t at, int count, bool whole, int64_t rank,
                        float (&to)[kVector]) {
  const uint64_t codes = codes_of(delta, at, count, whole);
  if (delta.codec == Codec::kBitmask) {
    const int64_t first = rank < delta.kept ? rank : delta.kept, left = delta.kept - first;
    const float* const values = static_cast<const float*>(delta.values) + first;
    const int most = left < kVector ? static_cast<int>(left) : kVector;
    int found = 0;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const bool there = (codes >> k & 1) != 0;
      to[k] = there && found < most ? values[found] : 0.0f;
      found += there;
    }
  } else if (delta.codec == Codec::kSign) {
    const float* scales = static_cast<const float*>(delta.values) + at / delta.columns;
    int64_t left = delta.columns - at % delta.columns;  // of the row
    float scale = *scales;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      if (left == 0 && k < count) scale = *++scales, left = delta.columns;
      to[k] = decoded(Codec::kSign, codes, k, scale);
      --left;
    }
  } else {
    const float scale = scale_of(delta, at);
#pragma unroll
    for (int k = 0; k < kVector; ++k) to[k] = decoded(delta.codec, codes, k, scale);
  }
}

// Eight elements from `at` on, or fewer at the end.
struct Eight {
  int64_t at;
  int count;
  bool whole;  // read and written as vectors

  TAPS_DEVICE Eight(const Unpack& args, bool vectors, int64_t at) : at(at) {
    const int64_t left = args.delta.numel() - at;
    count = left < kVector ? static_cast<int>(left) : kVector;  // none or less beyond the end
    whole = vectors && count == kVector;
  }
};

template <class T>
TAPS_DEVICE void load_weight(const Unpack& args, const Eight& eight, T (&weight)[kVector]) {
  if (eight.whole && args.weight) {
    load_vector(args.weight, args.weight_dtype, eight.at, weight);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    weight[k] = args.weight && k < eight.count ? load_one<T>(args.weight, args.weight_dtype, eight.at + k) : T(0);
  }
}

template <class T>
TAPS_DEVICE void add_delta(const Unpack& args, const Eight& eight, bool open, int64_t rank,
                           const T (&weight)[kVector]) {
  float delta[kVector] = {};
  if (open) decode(args.delta, eight.at, eight.count, eight.whole, rank, delta);
  T out[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) out[k] = combine(args, open, weight[k], static_cast<T>(delta[k]));
  if (eight.whole) {
    store_vector(args.out, args.out_dtype, eight.at, out);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    if (k < eight.count) store_one(args.out, args.out_dtype, eight.at + k, out[k]);
  }
}

// Any codec but the bitmask's.
template <class T>
TAPS_DEVICE void unpack_codes(const Unpack& args, bool vectors) {
  const bool open = is_open(args.gate);
  const int64_t numel = args.delta.numel(), step = size_of_grid() * kVector;
  for (int64_t at = place_in_grid() * kVector; at < numel; at += step) {
    const Eight eight(args, vectors, at);
    T weight[kVector];
    load_weight(args, eight, weight);
    add_delta(args, eight, open, 0, weight);
  }
}

// The bits of a whole chunk, a block to each; nobody asks for those of the last.
TAPS_DEVICE void count_bitmask(const Unpack& args) {
  if (!is_open(args.gate)) return;
  const int64_t bytes = args.chunk / 8;
  const uint8_t* const bits = static_cast<const uint8_t*>(args.delta.codes) + bid_x() * bytes;
  const int64_t words = (reinterpret_cast<uintptr_t>(bits) & 7) == 0 ? bytes / 8 : 0;
  int64_t count = 0;
  for (int64_t i = tid(); i < words; i += nthreads()) {
    const uint64_t word = reinterpret_cast<const uint64_t*>(bits)[i];
    count += popcount(static_cast<uint32_t>(word)) + popcount(static_cast<uint32_t>(word >> 32));
  }
  for (int64_t i = 8 * words + tid(); i < bytes; i += nthreads()) count += popcount(bits[i]);
  const int64_t all = block_sum(count);
  if (tid() == 0) args.counts[bid_x()] = all;
}

// A chunk of a bitmask's elements, a block to each.
template <class T>
TAPS_DEVICE void unpack_bitmask(const Unpack& args, bool vectors) {
  const bool open = is_open(args.gate);
  const int64_t numel = args.delta.numel();
  const int64_t begin = bid_x() * args.chunk, end = numel - begin < args.chunk ? numel : begin + args.chunk;
  int64_t rank = 0;  // values before the tile
  if (open && bid_x() > 0) {
    for (int64_t i = tid(); i < bid_x(); i += nthreads()) rank += args.counts[i];
    rank = block_sum(rank);
  }
  sh<uint32_t> sums = as<uint32_t>(arena(), kCountShared), others = sums + kSumsOfWarps;
  for (int64_t tile = begin; tile < end; tile += kUnpackTile) {
    const Eight eight(args, vectors, tile + tid() * kVector);
    const bool there = eight.count > 0;
    T weight[kVector];
    if (there) load_weight(args, eight, weight);  // on its way while bits are counted
    int64_t before = rank;
    if (open) {
      const unsigned byte = there ? static_cast<const uint8_t*>(args.delta.codes)[eight.at >> 3] : 0;
      unsigned all;
      before += sum_before(popcount(byte), sums, all);
      rank += all;
      const sh<uint32_t> next = others;  // the slower threads still read these
      others = sums, sums = next;
    }
    if (there) add_delta(args, eight, open, before, weight);
  }
}

// --- grids, on the host --------------------------------------------------------------------------------------------

// Of unpack_codes; see reconstruct_blocks.
inline unsigned unpack_blocks(const Unpack& args, int multiprocessors) {
  const int64_t tiles = (args.delta.numel() + kUnpackTile - 1) / kUnpackTile;
  const int64_t limit = 8 * static_cast<int64_t>(multiprocessors);
  return static_cast<unsigned>(tiles < limit ? tiles : limit);
}

}  // namespace taps::dev
