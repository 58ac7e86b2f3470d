// x as the tiles read it (isa.h), and the panels shared by the threads.
#pragma once

#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/split.h"

namespace taps::cpu {

inline float as_float(float value) { return value; }
inline float as_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// body(number of rows) with a number that the compiler knows.
template <class F, int... R>
inline void with_rows(int64_t rows, const F& body, std::integer_sequence<int, R...>) {
  using Body = void (*)(const F&);
  static constexpr Body kBodies[] = {+[](const F& run) { run(std::integral_constant<int, R + 1>()); }...};
  kBodies[rows - 1](body);
}
template <class F>
inline void with_rows(int64_t rows, const F& body) {
  with_rows(rows, body, std::make_integer_sequence<int, kMostTile>());
}

// Floats of memory for the largest block of `rows`.
inline int64_t packed_floats(int64_t rows, int64_t inputs) { return (rows < kTiledRows ? rows : kTiledRows) * inputs; }

// Runs `product`, rows packed by pack(first row, rows, to) into `memory`, tile by tile.
template <class Pack>
void run_packed(TileProduct product, float* memory, const Pack& pack) {
  const Tiles set = tiles();
  const Split split(product.rows, set.rows);
  parallel_for(split.parts, 1 + kGrain / (product.inputs * set.rows), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      pack(split.begin(part), split.size(part), memory + split.begin(part) * product.inputs);
    }
  });
  product.packed = memory;
  const int64_t panels = (product.outputs + set.outputs - 1) / set.outputs;
  parallel_for(panels, 1 + kGrain / (product.inputs * set.outputs), [&](int64_t begin, int64_t end) {
    const int64_t last = end * set.outputs;
    set.run(product, begin * set.outputs, last < product.outputs ? last : product.outputs);
  });
}

}  // namespace taps::cpu
