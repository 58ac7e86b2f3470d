// What a codec makes of a Delta, on the CPU: blocks of it go to the loops of encoders.cpp side by side.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace taps::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // a multiple of a scale's group, and of the bits of a byte
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
constexpr Chosen kNotZero = {~0u, 1};  // -0.0 is no zero here: nothing is lost

template <class F>
void for_blocks(int64_t numel, const F& body) {
  parallel_for((numel + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      body(block, block * kBlock, std::min(kBlock, numel - block * kBlock));
    }
  });
}

bool encode_groups(const Encode& args) {
  const Encoders& set = encoders();
  std::atomic<bool> held{true};
  for_blocks(args.numel(), [&](int64_t, int64_t at, int64_t n) {
    void* codes = static_cast<char*>(args.codes) + (args.codec == Codec::kInt4 ? at / 2 : at);
    uint16_t* scales = static_cast<uint16_t*>(args.values) + at / kScaleGroup;
    if (!set.groups(args.delta + at, n, args.codec, codes, scales)) held = false;
  });
  return held;
}

bool encode_sign(const Encode& args) {
  const Encoders& set = encoders();
  std::atomic<bool> held{true};
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.columns));
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double sum = set.sum_of_magnitudes(args.delta + row * args.columns, args.columns);
      if (!(sum - sum == 0.0)) held = false;
      static_cast<float*>(args.values)[row] =
          args.columns == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(args.columns));
    }
  });
  for_blocks(args.numel(), [&](int64_t, int64_t at, int64_t n) {
    set.signs(args.delta + at, n, static_cast<uint8_t*>(args.codes) + at / 8);
  });
  return held;
}

// Of some choices, the elements that each takes before every block, and of all.
template <size_t kCount>
std::array<std::vector<int64_t>, kCount> ranks_of(const Encode& args, const std::array<Chosen, kCount>& choices) {
  const Encoders& set = encoders();
  std::array<std::vector<int64_t>, kCount> ranks;
  for (std::vector<int64_t>& of : ranks) of.resize(static_cast<size_t>((args.numel() + kBlock - 1) / kBlock) + 1);
  for_blocks(args.numel(), [&](int64_t block, int64_t at, int64_t n) {
    for (size_t k = 0; k < kCount; ++k) {
      ranks[k][static_cast<size_t>(block) + 1] = set.count_from(args.delta + at, n, choices[k]);
    }
  });
  for (std::vector<int64_t>& of : ranks) std::partial_sum(of.begin(), of.end(), of.begin());
  return ranks;
}

// The magnitude, as bits, of the element that comes `count`-th when the largest come first. 1 <= count <= numel. First
// its upper 11 bits, by their histogram (four, for neighbours are alike), then it is looked for among those alike.
uint32_t nth_magnitude(const Encode& args, int64_t count) {
  constexpr int kShift = 20;
  constexpr size_t kBuckets = 1 << 11;
  const int64_t numel = args.numel();
  const auto bits_at = [&](int64_t i) {
    uint32_t bits;
    std::memcpy(&bits, args.delta + i, sizeof bits);
    return bits & kMagnitude;
  };
  std::vector<int64_t> found(4 * kBuckets);
  for (int64_t i = 0; i < numel; ++i) ++found[(static_cast<size_t>(i) & 3) * kBuckets + (bits_at(i) >> kShift)];
  size_t bucket = kBuckets;
  int64_t above = 0, here = 0;  // elements in larger buckets, and in this one
  while (above + here < count) {
    above += here;
    --bucket;
    here = found[bucket] + found[kBuckets + bucket] + found[2 * kBuckets + bucket] + found[3 * kBuckets + bucket];
  }
  std::vector<uint32_t> alike(static_cast<size_t>(here) + 1);
  size_t at = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const uint32_t bits = bits_at(i);
    alike[at] = bits;
    at += bits >> kShift == bucket;
  }
  alike.pop_back();
  const auto nth = alike.begin() + (count - above - 1);
  std::nth_element(alike.begin(), nth, alike.end(), std::greater<uint32_t>());
  return *nth;
}

// Writes bitmap and values: those that `above` takes, and of those that `from` takes too the first, until there are
// `kept`.
void write_chosen(const Encode& args, Chosen from, Chosen above, int64_t kept) {
  const Encoders& set = encoders();
  const auto [some, all] = ranks_of<2>(args, {above, from});
  const int64_t equal = kept - some.back();  // that are taken
  for_blocks(args.numel(), [&, &some = some, &all = all](int64_t block, int64_t at, int64_t n) {
    const size_t b = static_cast<size_t>(block);
    const int64_t before = std::min(all[b] - some[b], equal);
    const int64_t here = std::min(all[b + 1] - some[b + 1], equal) - before;
    const int64_t rank = some[b] + before, count = some[b + 1] - some[b] + here;
    uint8_t* bits = static_cast<uint8_t*>(args.codes) + at / 8;
    float* values = static_cast<float*>(args.values) + rank;
    float block_values[kBlock + 16];
    if (here == 0 || here == all[b + 1] - some[b + 1] - (all[b] - some[b])) {
      set.choose(args.delta + at, n, here == 0 ? above : from, bits, block_values);
    } else {  // the one block in which the equal ones end
      int64_t left = here, found = 0;
      std::memset(bits, 0, static_cast<size_t>((n + 7) / 8));
      for (int64_t i = 0; i < n; ++i) {
        uint32_t value;
        std::memcpy(&value, args.delta + at + i, sizeof value);
        const bool larger = above.takes(value), taken = larger || (from.takes(value) && left > 0);
        if (!taken) continue;
        left -= !larger;
        bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | 1u << (i % 8));
        block_values[found++] = args.delta[at + i];
      }
    }
    if (count > 0) std::memcpy(values, block_values, static_cast<size_t>(count) * sizeof(float));
  });
}

bool encode_bitmask(const Encode& args) {
  const auto counts = ranks_of<3>(args, {Chosen{kMagnitude, kInfinity}, kNotZero, Chosen{kMagnitude, 1}});
  if (counts[0].back() > 0) return false;
  if (args.kept == counts[1].back()) {
    write_chosen(args, kNotZero, kNotZero, args.kept);
    return true;
  }
  if (args.kept > counts[2].back()) return false;
  const uint32_t least = args.kept == 0 ? kInfinity : nth_magnitude(args, args.kept);
  write_chosen(args, {kMagnitude, least}, {kMagnitude, least + 1}, args.kept);
  return true;
}

}  // namespace

bool encode(const Encode& args) {
  switch (args.codec) {
    case Codec::kBitmask:
      return encode_bitmask(args);
    case Codec::kInt8:
    case Codec::kInt4:
      return encode_groups(args);
    case Codec::kSign:
      return encode_sign(args);
  }
  return false;
}

}  // namespace taps::cpu
