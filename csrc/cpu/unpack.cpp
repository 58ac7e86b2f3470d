// W_t = W + g * Delta of a packed Delta on the CPU: blocks that stay in L1 cache are decoded and added at once.
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace taps::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // a multiple of a scale's group, and of the bits that a lane takes

void* advance(void* data, Dtype dtype, int64_t elements) {
  return static_cast<char*>(data) + elements * size_of(dtype);
}

}  // namespace

int64_t count_bits(const void* bits, int64_t bytes) {
  const uint8_t* byte = static_cast<const uint8_t*>(bits);
  int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, byte + i, sizeof word);
    count += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) count += __builtin_popcount(byte[i]);
  return count;
}

void unpack(const Unpack& args) {
  const int64_t numel = args.delta.numel();
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  const bool masked = args.delta.codec == Codec::kBitmask;
  std::vector<int64_t> ranks(masked ? static_cast<size_t>(blocks) : 0);  // values before each block
  for (int64_t block = 0, rank = 0; masked && block < blocks; ++block) {
    ranks[static_cast<size_t>(block)] = rank;
    const int64_t left = numel - block * kBlock;
    rank += count_bits(static_cast<const uint8_t*>(args.delta.codes) + block * (kBlock / 8),
                       ((left < kBlock ? left : kBlock) + 7) / 8);
  }
  const Lanes& set = lanes();
  parallel_for(blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    float decoded[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kBlock;
      const int64_t n = numel - at < kBlock ? numel - at : kBlock;
      set.decode(args.delta, at, n, masked ? ranks[static_cast<size_t>(block)] : 0, decoded);
      const void* weight = args.weight ? advance(const_cast<void*>(args.weight), args.weight_dtype, at) : nullptr;
      set.reconstruct(advance(args.out, args.out_dtype, at), args.out_dtype, 1, {weight, args.weight_dtype, 1},
                      {decoded, Dtype::kFloat32, 1}, 1.0, args.in_double(), n);
    }
  });
}

}  // namespace taps::cpu
