// A square of floats, turned in registers: kLanes vectors of kLanes elements.
#pragma once

#include <utility>

#include "cpu/vectors.h"

namespace taps::cpu {
namespace {

// Element i of the result is element Pattern::from(i) of a and b, counted on from a to b.
template <class Pattern, int... I>
inline Vec shuffle(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pattern::from(I)...);
#else
  return __builtin_shuffle(a, b, Bits{Pattern::from(I)...});
#endif
}

// Of every four elements of a and b half kHalf, by blocks of kBlock in turn.
template <int kBlock, int kHalf>
struct InFours {
  static constexpr uint32_t from(int i) {
    const int at = i % 4;
    return i - at + at / (2 * kBlock) * kBlock + at % kBlock + kHalf * 2 + at / kBlock % 2 * kLanes;
  }
};

// Of every two blocks of kBlock elements the one numbered kHalf: a's, then b's.
template <int kBlock, int kHalf>
struct InBlocks {
  static constexpr uint32_t from(int i) { return i + kHalf * kBlock + (i / kBlock % 2 == 0 ? 0 : kLanes - kBlock); }
};

template <template <int, int> class Pattern, int kBlock>
inline void exchange(Vec& a, Vec& b) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
  const Vec first = shuffle<Pattern<kBlock, 0>>(a, b, kAll);
  b = shuffle<Pattern<kBlock, 1>>(a, b, kAll);
  a = first;
}

template <int kBlock>
inline void transpose_blocks(Vec* rows) {
  if constexpr (kBlock < kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kBlock)) exchange<InBlocks, kBlock>(rows[i], rows[i + kBlock]);
    }
    transpose_blocks<2 * kBlock>(rows);
  }
}

// Rows become columns: first within squares of four by four, then the squares change places.
inline void transpose(Vec* rows) {
  for (int four = 0; four < kLanes; four += 4) {
    exchange<InFours, 1>(rows[four], rows[four + 1]);
    exchange<InFours, 1>(rows[four + 2], rows[four + 3]);
    exchange<InFours, 2>(rows[four], rows[four + 2]);
    exchange<InFours, 2>(rows[four + 1], rows[four + 3]);
    std::swap(rows[four + 1], rows[four + 2]);
  }
  transpose_blocks<4>(rows);
}

}  // namespace
}  // namespace taps::cpu
