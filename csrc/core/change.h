// A packed Delta as kernels see it: what a codec made of W's elements in the order of a row-major matrix [rows,
// columns] (layouts: docs/format.md, meaning: taps_ext/ops/codec.py). No torch here.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace taps {

enum class Codec : int8_t { kBitmask, kInt8, kInt4, kSign };

constexpr int64_t kScaleGroup = 32;  // elements of one scale of kInt8 and kInt4

struct PackedDelta {
  Codec codec = Codec::kInt8;
  const void* codes = nullptr;   // bits, or codes
  const void* values = nullptr;  // what the bits stand for, or scales
  int64_t rows = 0, columns = 0;
  int64_t kept = 0;  // values of kBitmask

  TAPS_BOTH int64_t numel() const { return rows * columns; }
};

// Whether bit i is set.
TAPS_BOTH inline bool bit_of(const void* bits, int64_t i) {
  return (static_cast<const uint8_t*>(bits)[i >> 3] >> (i & 7)) & 1;
}

// Code i of 4 bits, two's complement, the first of a byte in its lower half.
TAPS_BOTH inline int nibble_of(const void* codes, int64_t i) {
  const int nibble = (static_cast<const uint8_t*>(codes)[i >> 1] >> (4 * (i & 1))) & 15;
  return (nibble ^ 8) - 8;
}

// --- eight elements at a time, in registers --------------------------------------------------------

// The codes of elements [i, i + count) in a word, the first in its lowest bits; `i` is a multiple of eight, `count` at
// most eight. Where a bit is a code it is all of a byte. `whole`: eight elements, and `codes` begin on eight bytes.
TAPS_BOTH inline uint64_t codes_of(const PackedDelta& delta, int64_t i, int count, bool whole) {
  const uint8_t* from = static_cast<const uint8_t*>(delta.codes);
  if (delta.codec == Codec::kBitmask || delta.codec == Codec::kSign) return from[i >> 3];
  const bool narrow = delta.codec == Codec::kInt4;
  from += narrow ? i >> 1 : i;
  if (whole) return narrow ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint64_t*>(from);
  uint64_t word = 0;
  for (int k = 0; k < (narrow ? (count + 1) / 2 : count); ++k) word |= static_cast<uint64_t>(from[k]) << (8 * k);
  return word;
}

TAPS_BOTH inline float float_with(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The scale of element i of kInt8 and kInt4.
TAPS_BOTH inline float scale_of(const PackedDelta& delta, int64_t i) {
  return float_with(static_cast<uint32_t>(static_cast<const uint16_t*>(delta.values)[i / kScaleGroup]) << 16);
}

// Element k of a word of codes with its scale. A product is rounded by itself, as unpack does on the CPU: added to the
// weight without that, one of scales that no encoder writes would be another number where it overflows.
TAPS_BOTH inline float decoded(Codec codec, uint64_t codes, int k, float scale) {
  if (codec == Codec::kSign) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return float_with(bits ^ static_cast<uint32_t>(codes >> k & 1) << 31);
  }
  const int code = codec == Codec::kInt8 ? static_cast<int8_t>(codes >> (8 * k) & 255)
                                         : (static_cast<int>(codes >> (4 * k) & 15) ^ 8) - 8;
#ifdef __CUDA_ARCH__
  return __fmul_rn(static_cast<float>(code), scale);
#else
  return static_cast<float>(code) * scale;
#endif
}

}  // namespace taps
