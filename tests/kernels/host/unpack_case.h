// One packed Delta on the twin, against plain loops: every operand in an allocation of its exact size, so that what is
// not there cannot be read.
#pragma once

#include "cuda/unpack.cuh"
#include "elementwise_case.h"

namespace host {

using taps::Codec;
using taps::kUnpackTile;
using taps::PackedDelta;
using taps::Unpack;

constexpr Codec kCodecs[] = {Codec::kBitmask, Codec::kInt8, Codec::kInt4, Codec::kSign};

// Bytes from `offset` on, in an allocation that begins on 16 bytes and ends with them.
struct Memory {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t count;
  uint8_t* data;

  explicit Memory(int64_t count, int64_t offset = 0) : count(count) {
    const auto bytes = static_cast<std::size_t>(offset + count);
    void* place = nullptr;
    if (posix_memalign(&place, 16, bytes + (bytes == 0)) != 0) std::abort();
    memory.reset(place);
    std::memset(place, 0xff, bytes);
    data = static_cast<uint8_t*>(place) + offset;
  }
};

struct Packing {
  Codec codec;
  int64_t rows, columns;
  Dtype out = Dtype::kFloat32, weight = Dtype::kFloat32;
  bool no_weight = false;
  int64_t out_offset = 0, weight_offset = 0, codes_offset = 0;  // elements, elements, bytes
  How how = How::kOpen;
  double share = 0.3;       // of a bitmap's bits
  int64_t missing = 0;      // values fewer than bits, all of them at most; below 0, more
  bool bits_behind = true;  // set behind the last element, as no encoder writes them
  int64_t chunk = 0;        // 0: as the operator has it
  uint64_t seed = 0;
};

// Runs it as unpack.cu launches it.
inline std::string run(const Unpack& args, uint64_t seed, int multiprocessors) {
  const bool vectors = takes_vectors(args), in_double = args.in_double();
  if (args.delta.numel() == 0) return "";
  if (args.delta.codec != Codec::kBitmask) {
    return none(twin::launch(
        {unpack_blocks(args, multiprocessors)}, kThreads, 0,
        [&] { in_double ? unpack_codes<double>(args, vectors) : unpack_codes<float>(args, vectors); }, seed));
  }
  const auto chunks = static_cast<unsigned>(args.chunks());
  std::string wrong;
  if (chunks > 1) wrong = none(twin::launch({chunks - 1}, kThreads, kCountShared, [&] { count_bitmask(args); }, seed));
  if (!wrong.empty()) return wrong;
  return none(twin::launch(
      {chunks}, kThreads, kBitmaskShared,
      [&] { in_double ? unpack_bitmask<double>(args, vectors) : unpack_bitmask<float>(args, vectors); }, seed));
}

// The Delta, by the layouts of docs/format.md, one element after the other.
inline std::vector<double> read_plainly(const PackedDelta& delta) {
  const auto* codes = static_cast<const uint8_t*>(delta.codes);
  const auto* floats = static_cast<const float*>(delta.values);
  const auto scale = [&](int64_t group) { return load_one<double>(delta.values, Dtype::kBFloat16, group); };
  std::vector<double> all;
  int64_t found = 0;
  for (int64_t i = 0; i < delta.rows * delta.columns; ++i) {
    const bool bit = codes[i / 8 * (delta.codec != Codec::kInt8)] / (1 << i % 8) % 2 == 1;
    if (delta.codec == Codec::kBitmask) {
      all.push_back(bit && found < delta.kept ? floats[found] : 0.0);
      found += bit;
    } else if (delta.codec == Codec::kSign) {
      const double size = floats[i / delta.columns];
      all.push_back(bit ? -size : size);
    } else {
      const int nibble = i % 2 == 0 ? codes[i / 2] % 16 : codes[i / 2] / 16;
      const int code = delta.codec == Codec::kInt8 ? (codes[i] < 128 ? codes[i] : codes[i] - 256)
                                                   : (nibble < 8 ? nibble : nibble - 16);
      all.push_back(static_cast<float>(code * scale(i / 32)));  // exact, or beyond every float
    }
  }
  return all;
}

inline std::string check_unpack(const Packing& p) {
  const int64_t numel = p.rows * p.columns;
  const bool bits = p.codec == Codec::kBitmask || p.codec == Codec::kSign;
  const bool open = p.how == How::kOpen || p.how == How::kReadOpen;
  std::mt19937 random(static_cast<unsigned>(numel + 7 * static_cast<int>(p.codec)));
  const int64_t bytes = bits ? (numel + 7) / 8 : p.codec == Codec::kInt4 ? (numel + 1) / 2 : numel;
  Memory codes(open ? bytes : 0, p.codes_offset);  // of a closed one there is nothing to read
  int64_t set = 0;
  for (int64_t i = 0; i < codes.count; ++i) {
    codes.data[i] = static_cast<uint8_t>(random());
    if (p.codec == Codec::kBitmask) {
      codes.data[i] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool behind = 8 * i + bit >= numel;
        const bool one = behind ? p.bits_behind : random() % 1000 < 1000 * p.share;
        codes.data[i] = static_cast<uint8_t>(codes.data[i] | one << bit);
        set += one && !behind;
      }
    }
  }
  const int64_t kept = set > p.missing ? set - p.missing : 0;
  const int64_t wanted = p.codec == Codec::kBitmask ? kept : bits ? p.rows : (numel + 31) / 32;
  Array values(bits ? Dtype::kFloat32 : Dtype::kBFloat16, open ? wanted : 0);
  values.draw(random);
  for (int64_t i = 5; i < values.count; i += 11) store_one(values.data, values.dtype, i, i % 2 == 0 ? 2e38 : -0.0);
  Array out(p.out, numel, p.out_offset), weight(p.weight, p.no_weight ? 0 : numel, p.weight_offset);
  weight.draw(random);
  for (int64_t i = 3; i < weight.count; i += 7) store_one(weight.data, weight.dtype, i, -0.0);
  const float score = p.how == How::kReadOpen ? 0.1f : 0.05f;

  Unpack args;
  args.delta = {p.codec, codes.data, values.data, p.rows, p.columns, p.codec == Codec::kBitmask ? kept : 0};
  args.out = out.data, args.weight = p.no_weight ? nullptr : weight.data;
  args.out_dtype = p.out, args.weight_dtype = p.weight;
  args.gate.open = p.how == How::kOpen, args.gate.threshold = 0.1;
  if (p.how == How::kReadOpen || p.how == How::kReadClosed) args.gate.score = &score;
  args.chunk = p.codec == Codec::kBitmask && p.chunk > 0 ? p.chunk : unpack_chunk(args.delta);
  Memory counts(args.chunks() > 1 ? (args.chunks() - 1) * 8 : 0);
  args.counts = reinterpret_cast<int64_t*>(counts.data);
  const std::string which = "codec " + std::to_string(static_cast<int>(p.codec)) + ", " + std::to_string(p.rows) +
                            " x " + std::to_string(p.columns);
  if (std::string wrong = run(args, p.seed, 1); !wrong.empty()) return which + ": " + wrong;
  const std::vector<double> delta = open ? read_plainly(args.delta) : std::vector<double>();
  for (int64_t i = 0; i < numel; ++i) {
    const auto at = static_cast<std::size_t>(i);
    // `rebuilt` asks whether there is a Delta as a tensor; a packed one is never fp64.
    const double want = rebuilt(args, p.no_weight ? 0.0 : weight[i], open ? delta[at] : 0.0, open);
    if (!out.same(i, want))
      return which + ": expected " + std::to_string(want) + " at " + std::to_string(i) + ", got " +
             std::to_string(out[i]);
  }
  return "";
}

}  // namespace host
