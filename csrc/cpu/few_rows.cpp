// y = x W_t^T + bias for few rows of x: W and Delta are read once, and W_t lives in registers and L1. Compiled once per
// instruction set with TAPS_ISA naming it (isa.h); everything but the table at the end has internal linkage.
//
// A thread takes four outputs at a time, or one where there are one or two rows. Along the depth, block after block,
// the first rows of x build their weights in registers, keep them in L1 for the other rows, and ask for what the next
// block reads: memory is read in two streams an output while all rows are multiplied. Sums are kept lane by lane in
// fp32 and added in the end, in an order that the instruction set and the depth alone decide.
#include "cpu/transpose.h"

namespace taps::cpu {
namespace {

#if TAPS_LANES == 16
constexpr int kMostRows = 6;  // 24 sums, 6 of x and a weight in 32 registers
#else
constexpr int kMostRows = 3;  // 12 sums, 3 of x and a weight in 16 registers
#endif
constexpr int kOutputs = kFewRowsOutputs;
constexpr int64_t kAloneRows = 2;  // up to which x costs less than streams do: one output at a time
constexpr int64_t kDepth = 256;    // of a block, in words: four rows of W_t take an eighth of L1

static_assert(kFewRowsPadding % kLanes == 0, "padded rows hold whole vectors");

// For the lines that begin in the step of elements `at` lies in.
template <int64_t kStep, class Element>
inline void ask(const Element* from, int64_t at) {
  constexpr int64_t kBytes = kStep * static_cast<int64_t>(sizeof(Element)), kLine = 64;
  const char* const bytes = reinterpret_cast<const char*>(from + at);
  if (kBytes < kLine && at / kStep * kBytes % kLine != 0) return;
  for (int64_t line = 0; line < kBytes; line += kLine) __builtin_prefetch(bytes + line, 0, 3);
}

template <int64_t kStep, class Packed>
inline void ask(const Cursor<Packed>& from, int64_t at) {
  const int64_t bits = at * Packed::kBits;
  if (bits % 512 == 0) __builtin_prefetch(from.codes + (from.at * Packed::kBits + bits) / 8, 0, 3);
}

// What one thread works on: N outputs (kOutputs, or one at the end), block after block along the depth.
template <class T, int N>
struct Panel {
  using W = typename T::W::Element;
  using D = typename T::D::Pointer;
  float weights[N * kDepth];  // W_t of the block
  Vec sums[kFewRows][N];

  // Where a block's rows of W and Delta begin, and the next one's; of how many elements it is.
  struct Block {
    const W *w[N], *next_w[N];
    D d[N], next_d[N];
    int64_t elements;
  };

  enum Pass { kOnly, kFirst, kLater };  // the rows that build the weights; that keep them for others; the others

  // Adds the products of the block with rows [row, row + M) of x.
  template <int M, Pass kPass>
  void multiply(const Block& block, const float* x, int64_t ld, int row) {
    Vec sum[N][M];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sum[n][m] = sums[row + m][n];
    }
    const auto step = [&](int64_t k, const auto& weight_of) {  // a word in each lane
      Vec own[M];
      for (int m = 0; m < M; ++m) own[m] = loaded<Vec>(x + (row + m) * ld + k);
#pragma GCC unroll 4  // all, or sums are kept in memory
      for (int n = 0; n < N; ++n) {
        const Vec weight = weight_of(n);
        if (kPass == kFirst) store(weights + n * kDepth + k, weight);
        for (int m = 0; m < M; ++m) sum[n][m] = T::add(sum[n][m], weight, own[m]);
      }
    };
    int64_t k = 0;
    if (kPass == kLater) {
      for (; k * T::kInWord < block.elements; k += kLanes) {
        step(k, [&](int n) { return loaded<Vec>(weights + n * kDepth + k); });
      }
    } else {
      int64_t at = 0;  // in elements
      for (; at + T::kStep <= block.elements; at += T::kStep, k += kLanes) {
        step(k, [&](int n) {
          ask<T::kStep>(block.next_w[n], at);
          ask<T::kStep>(block.next_d[n], at);
          return T::weight(block.w[n] + at, block.d[n] + at);
        });
      }
      if constexpr (!T::D::kPacked) {  // whose rows are whole steps
        if (at < block.elements) {
          step(k, [&](int n) { return T::weight(block.w[n] + at, block.d[n] + at, block.elements - at); });
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sums[row + m][n] = sum[n][m];
    }
  }

  template <Pass kPass>
  void some(int count, const Block& block, const float* x, int64_t ld, int row) {
    switch (count) {
      case 1:
        return multiply<1, kPass>(block, x, ld, row);
      case 2:
        return multiply<2, kPass>(block, x, ld, row);
#if TAPS_LANES == 16
      case 4:
        return multiply<4, kPass>(block, x, ld, row);
      case 5:
        return multiply<5, kPass>(block, x, ld, row);
      case 6:
        return multiply<6, kPass>(block, x, ld, row);
#endif
      default:
        return multiply<3, kPass>(block, x, ld, row);
    }
  }
};

// The lanes of up to kLanes sums added in order, each sum's total in a lane: side by side, but for those of
// outputs that are taken alone.
template <int N>
Vec added(const Vec* sums, int64_t count) {
  Vec all{};
  if (N == 1 && count <= kAloneRows) {
    for (int64_t i = 0; i < count; ++i) {
      float total = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) total += sums[i][lane];
      all[i] = total;
    }
    return all;
  }
  Vec square[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) square[i] = sums[i];
  transpose(square);
  for (const Vec& lane : square) all += lane;
  return all;
}

// The first `count` elements of a vector, N to a row.
template <int N, class V, class E>
void put(V all, E* to, int64_t ld, int64_t count) {
  E elements[kLanes];
  std::memcpy(elements, &all, sizeof elements);
  for (int64_t row = 0; row * N < count; ++row) std::memcpy(to + row * ld, elements + row * N, N * sizeof(E));
}

// The results of a panel.
template <class T, int N>
void finish(const LinearProduct& p, const Vec* sums, int64_t output) {
  static_assert(kLanes % N == 0, "whole rows at a time");
  Vec bias{};
  for (int i = 0; i < kLanes && p.bias; ++i) {
    const int64_t n = output + i % N;
    if constexpr (T::kRound) bias[i] = widened(static_cast<const uint16_t*>(p.bias)[n]);
    if constexpr (!T::kRound) bias[i] = static_cast<const float*>(p.bias)[n];
  }
  const int64_t count = p.rows * N;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t some = count - first < kLanes ? count - first : kLanes;
    Vec all = added<N>(sums + first, some) + bias;
    if constexpr (T::kRound) {
      put<N>(narrowed(all), static_cast<uint16_t*>(p.result) + first / N * p.ld_result + output, p.ld_result, some);
    } else {
      put<N>(all, static_cast<float*>(p.result) + first / N * p.ld_result + output, p.ld_result, some);
    }
  }
}

// x has rows of `ld` words with zeros behind the depth.
template <class T, int N>
void panel(const LinearProduct& p, const float* x, int64_t ld, int64_t output) {
  using W = typename T::W::Element;
  Panel<T, N> panel;
  const int rows = static_cast<int>(p.rows), parts = (rows + kMostRows - 1) / kMostRows;
  std::memset(panel.sums, 0, sizeof panel.sums[0] * static_cast<size_t>(rows));
  const auto w_at = [&](int n, int64_t at) {
    return static_cast<const W*>(p.weight.data) + (output + n) * p.weight.ld + at;
  };
  const auto d_at = [&](int n, int64_t at) { return T::D::begin(p, output + n) + at; };
  constexpr int64_t kBlock = kDepth * T::kInWord;  // in elements
  typename Panel<T, N>::Block block;
  for (int64_t at = 0; at < p.inputs; at += kBlock) {
    block.elements = p.inputs - at < kBlock ? p.inputs - at : kBlock;
    for (int n = 0; n < N; ++n) {
      const bool more = at + kBlock < p.inputs, last = output + N + n >= p.outputs;
      block.w[n] = w_at(n, at);
      block.d[n] = d_at(n, at);
      block.next_w[n] = more ? w_at(n, at + kBlock) : w_at(last ? n : N + n, 0);
      block.next_d[n] = more ? d_at(n, at + kBlock) : d_at(last ? n : N + n, 0);
    }
    const float* const own = x + at / T::kInWord;
    int row = 0;
    for (int part = 0; part < parts; ++part) {
      const int count =
          (rows - row + parts - part - 1) / (parts - part);  // shared evenly: few sums wait for each other
      if (part > 0) {
        panel.template some<Panel<T, N>::kLater>(count, block, own, ld, row);
      } else if (parts > 1) {
        panel.template some<Panel<T, N>::kFirst>(count, block, own, ld, row);
      } else {
        panel.template some<Panel<T, N>::kOnly>(count, block, own, ld, row);
      }
      row += count;
    }
  }
  finish<T, N>(p, &panel.sums[0][0], output);
}

template <class T>
void panels(const LinearProduct& p, const float* x, int64_t ld, int64_t begin, int64_t end) {
  int64_t output = begin;
  if (p.rows > kAloneRows || T::D::kPacked) {  // one chain of decoding alone would be waited for
    for (; output + kOutputs <= end; output += kOutputs) panel<T, kOutputs>(p, x, ld, output);
  }
  for (; output < end; ++output) panel<T, 1>(p, x, ld, output);
}

void few_rows(const LinearProduct& p, const float* x, int64_t ld, int64_t begin, int64_t end) {
  const auto run = [&](auto types) { panels<decltype(types)>(p, x, ld, begin, end); };
  p.packed.codes ? with_packed(p, run) : with_types(p, run);
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const FewRows TAPS_CONCAT(few_rows_, TAPS_ISA);
const FewRows TAPS_CONCAT(few_rows_, TAPS_ISA) = &few_rows;

}  // namespace taps::cpu
