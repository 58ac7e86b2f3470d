// y = x W_t^T + bias for more than a few rows of x, W_t built as it is packed. Compiled once per instruction set with
// TAPS_ISA naming it (isa.h); everything but the table at the end has internal linkage.
//
// A thread takes a panel of outputs, which lie in the lanes of two vectors. Block after block along the depth, their
// weights are read row by row, added, turned and packed in L1; then every tile of rows takes its sums into registers
// and adds the block, one element of x for all lanes at a time, while what the next block reads of W and Delta is asked
// for. Every sum is added in the order of the depth, so that it does not depend on the other rows and outputs.
#include <algorithm>

#include "cpu/split.h"
#include "cpu/transpose.h"

namespace taps::cpu {
namespace {

#if TAPS_LANES == 16
constexpr int kTile = 12;  // rows: 24 sums, two of W_t and an element of x in 32 registers
#else
constexpr int kTile = 6;  // 12 sums, two of W_t and an element of x in 16
#endif
static_assert(kTile <= kMostTile, "what packing makes room for");
constexpr int kOutputs = 2 * kLanes;
constexpr int64_t kDepth = 256;                    // most of a block, in words: 16 KB of a panel with AVX2, or 32
constexpr int kLine = 64;                          // bytes of a line of the cache
constexpr int kAhead = TAPS_LANES == 16 ? 16 : 4;  // pieces of W and Delta that a tile asks for
constexpr int kTogether = 16 / kAhead;             // steps to a line

// What a tile asks for: a line of each in turn.
struct Ahead {
  const char* pieces[kAhead];
};

// Adds the products of R rows of x with a packed block.
template <class T, int R>
void tile(const float* weights, const float* x, int64_t depth, float* sums, const Ahead& ahead) {
  Vec sum[R][2];
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) sum[r][half] = loaded<Vec>(sums + r * kOutputs + half * kLanes);
  }
  const auto step = [&](int64_t k) {
    const Vec low = loaded<Vec>(weights + k * kOutputs), high = loaded<Vec>(weights + k * kOutputs + kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec own = in_all_lanes(x + k * R + r);
      sum[r][0] = T::add(sum[r][0], low, own);
      sum[r][1] = T::add(sum[r][1], high, own);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    const char* const* const pieces = ahead.pieces + k / kTogether % kAhead;
#pragma GCC unroll 2  // more, and sums leave their registers
    for (int u = 0; u < 4; ++u) {
      if (u % kTogether == 0) __builtin_prefetch(pieces[u / kTogether] + k / 16 * kLine, 0, 2);
      step(k + u);
    }
  }
  for (; k < depth; ++k) step(k);
  for (int r = 0; r < R; ++r) {
    for (int half = 0; half < 2; ++half) store(sums + r * kOutputs + half * kLanes, sum[r][half]);
  }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, const Ahead&);

template <class T, int... R>
Tile tile_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Tile kTiles[] = {&tile<T, R + 1>...};
  return kTiles[rows - 1];
}

template <class T>
class Panel {
 public:
  // Beyond the last output its row is taken again; those sums are dropped.
  Panel(const TileProduct& p, int64_t output)
      : p_(p),
        output_(output),
        outputs_(std::min(p.outputs - output, kWidth)),
        depth_(depth_of((p.inputs + T::kInWord - 1) / T::kInWord)) {
    float bias[kOutputs] = {};
    for (int n = 0; n < kOutputs; ++n) {
      const int64_t row = std::min(output + n, p.outputs - 1);
      w_[n] = static_cast<const W*>(p.weight.data) + row * p.weight.ld;
      d_[n] = static_cast<const D*>(p.delta.data) + row * p.delta.ld;
      if (p.bias && T::kRound) bias[n] = widened(static_cast<const uint16_t*>(p.bias)[row]);
      if (p.bias && !T::kRound) bias[n] = static_cast<const float*>(p.bias)[row];
    }
    for (int64_t m = 0; m < p.rows; ++m) std::memcpy(sums_ + m * kOutputs, bias, sizeof bias);
  }

  void run() {
    const Split tiles(p_.rows, kTile);
    const int64_t words = (p_.inputs + T::kInWord - 1) / T::kInWord;
    for (int64_t at = 0; at < words; at += depth_) {
      const int64_t depth = std::min(words - at, depth_);
      pack(at * T::kInWord, std::min(p_.inputs - at * T::kInWord, depth_ * T::kInWord));
      for (int64_t part = 0; part < tiles.parts; ++part) {
        const int64_t row = tiles.begin(part), rows = tiles.size(part);
        const float* const x = p_.packed + row * words + rows * at;
        tile_of<T>(rows, std::make_integer_sequence<int, kTile>())(weights_, x, depth, sums_ + row * kOutputs,
                                                                   ahead(at * T::kInWord, part, tiles.parts));
      }
    }
  }

  void finish() {
    if (p_.result_step == 1) {
      for (int64_t m = 0; m < p_.rows; ++m) {
        const float* const sums = sums_ + m * kOutputs;
        if (T::kRound && outputs_ == kOutputs) {
          const Vec both = to_pairs(loaded<Vec>(sums), loaded<Vec>(sums + kLanes));
          std::memcpy(static_cast<uint16_t*>(p_.result) + place(m, 0), &both, sizeof both);
          continue;
        }
        for (int n = 0; n < outputs_; n += kLanes) {
          put(place(m, n), loaded<Vec>(sums + n), std::min<int64_t>(outputs_ - n, kLanes));
        }
      }
      return;
    }
    for (int64_t m = 0; m < p_.rows; m += kLanes) {
      const int64_t rows = std::min<int64_t>(p_.rows - m, kLanes);
      const bool adjacent = place(m + rows - 1, 0) - place(m, 0) == rows - 1;
      for (int first = 0; first < outputs_; first += kLanes) {
        Vec square[kLanes] = {};
        for (int64_t r = 0; r < rows; ++r) square[r] = loaded<Vec>(sums_ + (m + r) * kOutputs + first);
        transpose(square);
        for (int n = 0; n < kLanes && first + n < outputs_; ++n) {
          if (adjacent) {
            put(place(m, first + n), square[n], rows);
          } else {
            for (int64_t r = 0; r < rows; ++r) put(place(m + r, first + n), Vec{} + square[n][r], 1);
          }
        }
      }
    }
  }

 private:
  using W = typename T::W::Element;
  using D = typename T::D::Element;
  static constexpr int64_t kWidth = kOutputs;
  static constexpr int64_t kStride = kDepth + kLine / 4;  // not a power of two: rows would meet in the same sets

  void pack(int64_t at, int64_t elements) {
    for (int first = 0; first < kOutputs; first += kLanes) {
      for (int n = 0; n < kLanes; ++n) {
        const W* const w = w_[first + n] + at;
        const D* const d = d_[first + n] + at;
        float* const to = rows_ + n * kStride;
        int64_t k = 0;
        for (; k + T::kStep <= elements; k += T::kStep) store(to + k / T::kInWord, T::weight(w + k, d + k));
        if (k < elements) store(to + k / T::kInWord, T::weight(w + k, d + k, elements - k));
      }
      for (int64_t k = 0; k * T::kInWord < elements; k += kLanes) {
        Vec square[kLanes];
        for (int n = 0; n < kLanes; ++n) square[n] = loaded<Vec>(rows_ + n * kStride + k);
        transpose(square);
        for (int c = 0; c < kLanes; ++c) store(weights_ + (k + c) * kOutputs + first, square[c]);
      }
    }
  }

  // Pieces of the block after the one at `at`, shared by its tiles, as far as they ask; else what is in L1.
  Ahead ahead(int64_t at, int64_t part, int64_t parts) const {
    constexpr int64_t kOfW = pieces_of(sizeof(W)), kOfRow = kOfW + pieces_of(sizeof(D)), kAll = kOutputs * kOfRow;
    const int64_t next = at + depth_ * T::kInWord, size = depth_ / 16 * kLine;  // of a piece
    const bool more = next < p_.inputs, last = !more && output_ + 2 * kOutputs > p_.outputs;
    const int64_t share = last ? 0 : std::min<int64_t>((kAll + parts - 1) / parts, kAhead);
    Ahead result;
    for (int64_t i = 0; i < kAhead; ++i) {
      const int64_t piece = part * share + i, n = piece / kOfRow, of_row = piece % kOfRow;
      const char* from = reinterpret_cast<const char*>(weights_);
      if (i < share && piece < kAll) {
        const auto* const w = reinterpret_cast<const char*>(w_[n] + (more ? next : kOutputs * p_.weight.ld));
        const auto* const d = reinterpret_cast<const char*>(d_[n] + (more ? next : kOutputs * p_.delta.ld));
        from = of_row < kOfW ? w + of_row * size : d + (of_row - kOfW) * size;
      }
      result.pieces[i] = from;
    }
    return result;
  }
  // A line of a piece for every sixteen words.
  static constexpr int64_t pieces_of(size_t element) {
    return (16 * T::kInWord * static_cast<int64_t>(element) + kLine - 1) / kLine;
  }
  // Blocks of one size: a tile asks for as much of the next one as it multiplies of its own.
  static int64_t depth_of(int64_t words) {
    const int64_t blocks = std::max<int64_t>((words + kDepth - 1) / kDepth, 1);
    return (words + 16 * blocks - 1) / (16 * blocks) * 16;
  }

  int64_t place(int64_t m, int64_t n) const {
    return (p_.result_rows ? p_.result_rows[m] : m * p_.ld_result) + (output_ + n) * p_.result_step;
  }

  void put(int64_t at, Vec value, int64_t count) const {
    if constexpr (T::kRound) {
      const Halves rounded = narrowed(value);
      std::memcpy(static_cast<uint16_t*>(p_.result) + at, &rounded, static_cast<size_t>(count) * sizeof(uint16_t));
    } else if (count == kLanes) {
      store(static_cast<float*>(p_.result) + at, value);
    } else {
      std::memcpy(static_cast<float*>(p_.result) + at, &value, static_cast<size_t>(count) * sizeof(float));
    }
  }

  const TileProduct& p_;
  const int64_t output_, outputs_, depth_;
  const W* w_[kOutputs];
  const D* d_[kOutputs];
  alignas(kLine) float rows_[kLanes * kStride];
  alignas(kLine) float weights_[kDepth * kOutputs];
  alignas(kLine) float sums_[kTiledRows * kOutputs];
};

void run(const TileProduct& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto types) {
    for (int64_t output = begin; output < end; output += kOutputs) {
      Panel<decltype(types)> panel(p, output);
      panel.run();
      panel.finish();
    }
  });
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const Tiles TAPS_CONCAT(tiles_, TAPS_ISA);
const Tiles TAPS_CONCAT(tiles_, TAPS_ISA) = {&run, kTile, kOutputs, kPairs, kLanes};

}  // namespace taps::cpu
