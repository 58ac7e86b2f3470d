// x as the tiles read it (isa.h), and the panels shared by the threads.
#pragma once

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/split.h"

namespace taps::cpu {

// Words of `inputs` elements.
inline int64_t words_of(Dtype compute, int64_t inputs) {
  return compute == Dtype::kBFloat16 && tiles().pairs ? (inputs + 1) / 2 : inputs;
}

// Of memory for the largest block of rows.
inline int64_t packed_bytes(const LinearProduct& args) {
  return (args.rows < kTiledRows ? args.rows : kTiledRows) * words_of(args.compute, args.inputs) * 4;
}

// Runs `product`, rows packed by pack(first row, rows, to) into `memory`, tile by tile.
template <class Pack>
void run_packed(TileProduct product, float* memory, const Pack& pack) {
  const Tiles set = tiles();
  const int64_t words = words_of(product.compute, product.inputs);
  const Split split(product.rows, set.rows);
  parallel_for(split.parts, 1 + kGrain / (product.inputs * set.rows), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      pack(split.begin(part), split.size(part), memory + split.begin(part) * words);
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
