// y = x W_t^T + bias for few rows of x: W and Delta are read once, and W_t lives in registers and L1. Compiled once per
// instruction set with TAPS_ISA naming it (isa.h); everything but the table at the end has internal linkage.
//
// A thread takes four outputs at a time. Along the depth, block after block, their weights are built in L1 and
// multiplied by all rows of x, while what the next block reads is asked for. Sums are kept lane by lane in fp32 and
// added in the end, in an order that the instruction set and the depth alone decide.
#include "cpu/vectors.h"

namespace taps::cpu {
namespace {

#if TAPS_LANES == 16
constexpr int kMostRows = 6;  // 24 sums, 6 of x and a weight in 32 registers
#else
constexpr int kMostRows = 3;  // 12 sums, 3 of x and a weight in 16 registers
#endif
constexpr int kOutputs = kFewRowsOutputs;
constexpr int64_t kDepth = 256;  // of a block: four rows of W_t take an eighth of L1

static_assert(kFewRowsPadding % kLanes == 0, "padded rows hold whole vectors");

// What one thread works on: N outputs (kOutputs, or one at the end), block after block along the depth.
template <class T, int N>
struct Panel {
  using W = typename T::W::Element;
  using D = typename T::D::Element;
  float weights[N * kDepth];  // W_t of the block
  Vec sums[kFewRows][N];

  // All outputs side by side: rows that are read without a break are fetched ahead by the hardware.
  void build(const W* const* w, const D* const* d, int64_t whole) {
    int64_t k = 0;
    for (; k + kLanes <= whole; k += kLanes) {
      for (int n = 0; n < N; ++n) {
        const Vec weight = T::weight(T::W::load(w[n] + k), T::D::load(d[n] + k));
        std::memcpy(weights + n * kDepth + k, &weight, sizeof weight);
      }
    }
    for (int n = 0; n < N && k < whole; ++n) {
      const Vec weight =
          T::weight(load_part<typename T::W>(w[n] + k, whole - k), load_part<typename T::D>(d[n] + k, whole - k));
      std::memcpy(weights + n * kDepth + k, &weight, sizeof weight);
    }
  }

  // Adds the products of the block with rows [row, row + M) of x, and asks for what the next block reads of W and
  // Delta, those rows of it that the first kFetch of `w` and `d` point to.
  template <int M, int kFetch>
  void multiply(const float* x, int64_t ld, int row, int64_t depth, const W* const* w, const D* const* d) {
    Vec sum[N][M];
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sum[n][m] = sums[row + m][n];
    }
    for (int64_t k = 0; k < depth; k += kLanes) {
      for (int n = 0; n < kFetch; ++n) {  // a line of 16 floats at a time
        if (kLanes >= 16 || (k & kLanes) == 0) __builtin_prefetch(w[n] + k, 0, 2);
        if (kLanes >= 16 || (k & kLanes) != 0) __builtin_prefetch(d[n] + k, 0, 2);
      }
      Vec own[M];
      for (int m = 0; m < M; ++m) own[m] = loaded<Vec>(x + (row + m) * ld + k);
      for (int n = 0; n < N; ++n) {
        const Vec weight = loaded<Vec>(weights + n * kDepth + k);
        for (int m = 0; m < M; ++m) sum[n][m] += weight * own[m];
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sums[row + m][n] = sum[n][m];
    }
  }

  template <int kFetch>
  void some(int count, const float* x, int64_t ld, int row, int64_t depth, const W* const* w, const D* const* d) {
    switch (count) {
      case 1:
        return multiply<1, kFetch>(x, ld, row, depth, w, d);
      case 2:
        return multiply<2, kFetch>(x, ld, row, depth, w, d);
#if TAPS_LANES == 16
      case 4:
        return multiply<4, kFetch>(x, ld, row, depth, w, d);
      case 5:
        return multiply<5, kFetch>(x, ld, row, depth, w, d);
      case 6:
        return multiply<6, kFetch>(x, ld, row, depth, w, d);
#endif
      default:
        return multiply<3, kFetch>(x, ld, row, depth, w, d);
    }
  }
};

// x, as floats, has rows of `ld` elements with zeros behind the depth.
template <class T, int N>
void panel(const LinearProduct& p, const float* x, int64_t ld, int64_t output) {
  using W = typename T::W::Element;
  using D = typename T::D::Element;
  Panel<T, N> panel;
  const int rows = static_cast<int>(p.rows), parts = (rows + kMostRows - 1) / kMostRows;
  std::memset(panel.sums, 0, sizeof panel.sums[0] * static_cast<size_t>(rows));
  const auto w_at = [&](int n, int64_t at) {
    return static_cast<const W*>(p.weight.data) + (output + n) * p.weight.ld + at;
  };
  const auto d_at = [&](int n, int64_t at) {
    return static_cast<const D*>(p.delta.data) + (output + n) * p.delta.ld + at;
  };
  for (int64_t at = 0; at < p.inputs; at += kDepth) {
    const int64_t whole = p.inputs - at < kDepth ? p.inputs - at : kDepth;
    const int64_t depth = (whole + kLanes - 1) / kLanes * kLanes;
    const W *own_w[N], *next_w[N];
    const D *own_d[N], *next_d[N];
    for (int n = 0; n < N; ++n) {
      own_w[n] = w_at(n, at);
      own_d[n] = d_at(n, at);
      const bool more = at + kDepth < p.inputs, last = output + N + n >= p.outputs;
      next_w[n] = more ? w_at(n, at + kDepth) : w_at(last ? n : N + n, 0);
      next_d[n] = more ? d_at(n, at + kDepth) : d_at(last ? n : N + n, 0);
    }
    panel.build(own_w, own_d, whole);
    int row = 0;
    for (int part = 0; part < parts; ++part) {
      const int count =
          (rows - row + parts - part - 1) / (parts - part);  // shared evenly: few sums wait for each other
      if (N == kOutputs && part < kOutputs && parts >= kOutputs) {
        panel.template some<1>(count, x + at, ld, row, depth, next_w + part % N, next_d + part % N);
      } else if (N == kOutputs && parts >= 2 && part < 2) {
        panel.template some<2>(count, x + at, ld, row, depth, next_w + part * 2 % N, next_d + part * 2 % N);
      } else {
        panel.template some<0>(count, x + at, ld, row, depth, next_w, next_d);
      }
      row += count;
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < N; ++n) {
      float sum = 0.0f;
      for (int lane = 0; lane < kLanes; ++lane) sum += panel.sums[m][n][lane];
      const int64_t to = m * p.ld_result + output + n;
      if constexpr (!T::kRound) {
        if (p.bias) sum += static_cast<const float*>(p.bias)[output + n];
        static_cast<float*>(p.result)[to] = sum;
      } else {
        if (p.bias) sum += widened(static_cast<const uint16_t*>(p.bias)[output + n]);
        Vec all{};
        all[0] = sum;
        static_cast<uint16_t*>(p.result)[to] = static_cast<uint16_t>(as<Bits>(to_bfloat16(all))[0] >> 16);
      }
    }
  }
}

template <class T>
void panels(const LinearProduct& p, const float* x, int64_t ld, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + kOutputs <= end; output += kOutputs) panel<T, kOutputs>(p, x, ld, output);
  for (; output < end; ++output) panel<T, 1>(p, x, ld, output);
}

void few_rows(const LinearProduct& p, const float* x, int64_t ld, int64_t begin, int64_t end) {
  with_types(p, [&](auto types) { panels<decltype(types)>(p, x, ld, begin, end); });
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const FewRows TAPS_CONCAT(few_rows_, TAPS_ISA);
const FewRows TAPS_CONCAT(few_rows_, TAPS_ISA) = &few_rows;

}  // namespace taps::cpu
