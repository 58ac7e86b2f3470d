// y = x W_t^T + bias for more than a few rows of x, W_t built as it is packed. Compiled once per instruction set with
// TAPS_ISA naming it (isa.h); everything but the table at the end has internal linkage.
//
// A thread takes a panel of outputs, which lie in the lanes of two vectors. Block after block along the depth, their
// weights are read row by row, added, turned and packed in L1; then every tile of rows takes its sums into registers
// and adds the block, one element of x for all lanes at a time, while what the next block reads of W and Delta is asked
// for. Where x is too large to stay in L3, several panels take their turns on each block of it, their sums kept. Every
// sum is added in the order of the depth, so that it does not depend on the other rows and outputs.
#include <algorithm>
#include <memory>
#include <new>

#include "cpu/split.h"
#include "cpu/transpose.h"

namespace taps::cpu {
namespace {

constexpr int kOutputs = 2 * kLanes;
constexpr int64_t kDepth = 256;                    // most of a block, in words: 16 KB of a panel with AVX2, or 32
constexpr int kLine = 64;                          // bytes of a line of the cache
constexpr int kAhead = TAPS_LANES == 16 ? 16 : 4;  // pieces of W and Delta that a tile asks for
constexpr int kTogether = 16 / kAhead;             // steps to a line

// Words of x that L3 keeps beside other work; tests take fewer.
#if !defined(TAPS_KEPT)
#define TAPS_KEPT (5 << 18)
#endif
constexpr int64_t kKept = TAPS_KEPT;
// Words of a block of x and of sums: 832 KB of the 1 MB that Zen 5 has of L2. Not measured with AVX2.
constexpr int64_t kRoom = 13 << 14;
static_assert(kRoom >= kTiledRows * (kDepth + kOutputs), "at least one panel");

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

struct Aligned {
  void operator()(float* memory) const { operator delete[](memory, std::align_val_t(kLine)); }
};

// Adds up the panels [begin, end) of the outputs.
template <class T>
class Panels {
 public:
  Panels(const TileProduct& p, int64_t begin, int64_t end)
      : p_(p),
        words_((p.inputs + T::kInWord - 1) / T::kInWord),
        depth_(depth_of(words_)),
        end_(end),
        tiles_(p.rows, kTile) {
    // How many panels take turns, their sums in memory of their own; of one they are here.
    const int64_t panels = end - begin;
    const Split groups(panels, p.rows * words_ <= kKept ? 1 : (kRoom - p.rows * depth_) / (p.rows * kOutputs));
    if (groups.parts > 0 && groups.parts < panels) {
      const int64_t most = (panels + groups.parts - 1) / groups.parts;
      memory_.reset(new (std::align_val_t(kLine)) float[static_cast<size_t>(most * p.rows * kOutputs)]);
    }
    for (int64_t group = 0; group < groups.parts; ++group) run(begin + groups.begin(group), groups.size(group));
  }

 private:
  using W = typename T::W::Element;
  using D = typename T::D::Element;
  static constexpr int64_t kStride = kDepth + kLine / 4;  // not a power of two: rows would meet in the same sets

  void run(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) start(first + i, sums_of(i));
    for (int64_t at = 0; at < words_; at += depth_) {
      for (int64_t i = 0; i < count; ++i) {
        const bool last = i + 1 == count, deepest = at + depth_ >= words_;
        const Block own{first + i, at}, next = !last      ? Block{first + i + 1, at}
                                               : !deepest ? Block{first, at + depth_}
                                                          : Block{first + count, 0};
        pack(own);
        multiply(at, next, sums_of(i));
      }
    }
    for (int64_t i = 0; i < count; ++i) finish(first + i, sums_of(i));
  }

  // Of the panel's rows of W_t, and of x with them, `depth_` words from word `at` on, or what is left.
  struct Block {
    int64_t panel, at;
  };

  float* sums_of(int64_t i) { return memory_ ? memory_.get() + i * p_.rows * kOutputs : sums_; }

  // Beyond the last output its row is taken again; those sums are dropped.
  int64_t last_of(int64_t panel) const { return std::min<int64_t>(p_.outputs - panel * kOutputs, kOutputs) - 1; }

  // Where the rows of W and Delta under a block begin.
  struct Rows {
    const W* w;
    const D* d;
    int64_t ld_w, ld_d, last;

    const W* w_at(int64_t n) const { return w + std::min(n, last) * ld_w; }
    const D* d_at(int64_t n) const { return d + std::min(n, last) * ld_d; }
  };
  Rows rows_of(const Block& block) const {
    const int64_t output = block.panel * kOutputs, at = block.at * T::kInWord, ld_w = p_.weight.ld, ld_d = p_.delta.ld;
    return {static_cast<const W*>(p_.weight.data) + output * ld_w + at,
            static_cast<const D*>(p_.delta.data) + output * ld_d + at, ld_w, ld_d, last_of(block.panel)};
  }

  void start(int64_t panel, float* sums) const {
    float bias[kOutputs] = {};
    for (int n = 0; n <= last_of(panel) && p_.bias; ++n) {
      if (T::kRound) bias[n] = widened(static_cast<const uint16_t*>(p_.bias)[panel * kOutputs + n]);
      if (!T::kRound) bias[n] = static_cast<const float*>(p_.bias)[panel * kOutputs + n];
    }
    for (int64_t m = 0; m < p_.rows; ++m) std::memcpy(sums + m * kOutputs, bias, sizeof bias);
  }

  void pack(const Block& block) {
    const int64_t elements = std::min(p_.inputs - block.at * T::kInWord, depth_ * T::kInWord);
    const Rows rows = rows_of(block);
    for (int first = 0; first < kOutputs; first += kLanes) {
      for (int n = 0; n < kLanes; ++n) {
        const W* const w = rows.w_at(first + n);
        const D* const d = rows.d_at(first + n);
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

  void multiply(int64_t at, const Block& next, float* sums) const {
    const int64_t depth = std::min(words_ - at, depth_);
    const bool more = next.panel < end_;
    const Rows ahead_of = more ? rows_of(next) : Rows();
    for (int64_t part = 0; part < tiles_.parts; ++part) {
      const int64_t row = tiles_.begin(part), rows = tiles_.size(part);
      const float* const x = p_.packed + row * words_ + rows * at;
      tile_of<T>(rows, std::make_integer_sequence<int, kTile>())(weights_, x, depth, sums + row * kOutputs,
                                                                 ahead(more ? &ahead_of : nullptr, part));
    }
  }

  // Pieces of the next block, shared by the tiles, as far as they ask; else what is in L1.
  Ahead ahead(const Rows* next, int64_t part) const {
    constexpr int64_t kOfW = pieces_of(sizeof(W)), kOfRow = kOfW + pieces_of(sizeof(D)), kAll = kOutputs * kOfRow;
    const int64_t size = depth_ / 16 * kLine;  // of a piece
    const int64_t share = next ? std::min<int64_t>((kAll + tiles_.parts - 1) / tiles_.parts, kAhead) : 0;
    Ahead result;
    for (int64_t i = 0; i < kAhead; ++i) {
      const int64_t piece = part * share + i, n = piece / kOfRow, of_row = piece % kOfRow;
      const char* from = reinterpret_cast<const char*>(weights_);
      if (i < share && piece < kAll) {
        from = of_row < kOfW ? reinterpret_cast<const char*>(next->w_at(n)) + of_row * size
                             : reinterpret_cast<const char*>(next->d_at(n)) + (of_row - kOfW) * size;
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

  void finish(int64_t panel, const float* sums) const {
    const int64_t output = panel * kOutputs, outputs = last_of(panel) + 1;
    if (p_.result_step == 1) {
      for (int64_t m = 0; m < p_.rows; ++m, sums += kOutputs) {
        if (T::kRound && outputs == kOutputs) {
          const Vec both = to_pairs(loaded<Vec>(sums), loaded<Vec>(sums + kLanes));
          std::memcpy(static_cast<uint16_t*>(p_.result) + place(m, output), &both, sizeof both);
          continue;
        }
        for (int n = 0; n < outputs; n += kLanes) {
          put(place(m, output + n), loaded<Vec>(sums + n), std::min<int64_t>(outputs - n, kLanes));
        }
      }
      return;
    }
    for (int64_t m = 0; m < p_.rows; m += kLanes) {
      const int64_t rows = std::min<int64_t>(p_.rows - m, kLanes);
      const bool adjacent = place(m + rows - 1, 0) - place(m, 0) == rows - 1;
      for (int first = 0; first < outputs; first += kLanes) {
        Vec square[kLanes] = {};
        for (int64_t r = 0; r < rows; ++r) square[r] = loaded<Vec>(sums + (m + r) * kOutputs + first);
        transpose(square);
        for (int n = 0; n < kLanes && first + n < outputs; ++n) {
          if (adjacent) {
            put(place(m, output + first + n), square[n], rows);
          } else {
            for (int64_t r = 0; r < rows; ++r) put(place(m + r, output + first + n), Vec{} + square[n][r], 1);
          }
        }
      }
    }
  }

  int64_t place(int64_t m, int64_t n) const {
    return (p_.result_rows ? p_.result_rows[m] : m * p_.ld_result) + n * p_.result_step;
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
  const int64_t words_, depth_, end_;
  const Split tiles_;
  alignas(kLine) float rows_[kLanes * kStride];
  alignas(kLine) float weights_[kDepth * kOutputs];
  alignas(kLine) float sums_[kTiledRows * kOutputs];
  std::unique_ptr<float[], Aligned> memory_;
};

void run(const TileProduct& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto types) { Panels<decltype(types)>(p, begin / kOutputs, (end + kOutputs - 1) / kOutputs); });
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const Tiles TAPS_CONCAT(tiles_, TAPS_ISA);
const Tiles TAPS_CONCAT(tiles_, TAPS_ISA) = {&run, kTile, kOutputs, kPairs, kLanes};

}  // namespace taps::cpu
