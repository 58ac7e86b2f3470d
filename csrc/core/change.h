// A packed Delta as kernels see it: what a codec made of W's elements in the order of a row-major matrix [rows,
// columns] (layouts: docs/format.md, meaning: taps_ext/ops/codec.py). No torch here.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace taps {

enum class Codec : int8_t { kBitmask, kInt8, kInt4, kSign };

constexpr int64_t kScaleGroup = 32;  // elements of one scale of kInt8 and kInt4

struct PackedDelta {
  Codec codec = Codec::kInt8;
  const void* codes = nullptr;   // bits, or codes
  const void* values = nullptr;  // what the bits stand for, or scales
  int64_t rows = 0, columns = 0;

  int64_t numel() const { return rows * columns; }
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

}  // namespace taps
