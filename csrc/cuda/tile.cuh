// The main loop: Y [M, N] = X [M, K] times W_t [N, K] transposed, W_t = round(W + g * Delta) built in registers on
// its way to the tensor cores. A multi-stage ring of shared tiles is filled by cp.async; any M, N, K, leading
// dimension and alignment; sums in fp32, in an order that the shape alone decides.
//
// T is the type of X, W and Y (bf16 or f16), D that of Delta (float or T). A closed gate reads no byte of Delta.
#pragma once

#include "cuda/primitives.cuh"

namespace taps::dev {

// How the gate is known. kRead: score and threshold, on the device, the same for every thread of the grid.
enum class Gate : int { kClosed, kOpen, kRead };

template <class T, class D>
struct LinearArgs {
  const T* x;
  const T* weight;
  const D* delta;       // unless the gate is kClosed
  const T* bias;        // [N], or null
  T* y;
  float* partial;       // [splits, M, N], where splits > 1; y is then written by a second kernel
  const float* score;   // kRead
  float threshold;
  Gate gate;
  int64_t m, n, k;
  int64_t ldx, ldw, ldd, ldy;  // elements from row to row
  int64_t k_per_split;  // a multiple of the tile's depth
  int splits;
};

template <class T, class D, int kRows, int kColumns, int kWarpsM, int kWarpsN, int kStages>
struct LinearTile {
  using Args = LinearArgs<T, D>;
  static constexpr int kDepth = 32;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kM = kRows / kWarpsM / 16;    // tiles of 16 x 8 to a warp
  static constexpr int kN = kColumns / kWarpsN / 8;
  // Eight elements of padding: rows of 80 (160) bytes put every eight rows of a fragment into different banks.
  static constexpr int kStride = kDepth + 8;
  static constexpr unsigned kBytesX = kRows * kStride * sizeof(T);
  static constexpr unsigned kBytesW = kColumns * kStride * sizeof(T);
  static constexpr unsigned kBytesD = kColumns * kStride * sizeof(D);
  static constexpr unsigned kBytesStage = kBytesX + kBytesW + kBytesD;
  static constexpr unsigned kShared = kStages * kBytesStage;
  static_assert(kM * 16 * kWarpsM == kRows && kN * 8 * kWarpsN == kColumns && kStages >= 2, "tile shape");

  // `rows` x kDepth elements of a matrix from (row, column), zero outside [row_end, column_end). Whole 16-byte
  // pieces go by cp.async where the matrix is aligned for it, element by element otherwise.
  template <class E, int kTileRows>
  static TAPS_DEVICE void fetch(sh<E> tile, const E* from, int64_t ld, int64_t row, int64_t row_end, int64_t column,
                                int64_t column_end, bool aligned) {
    constexpr int kPiece = 16 / sizeof(E);
    constexpr int kAcross = kDepth / kPiece;
    for (unsigned i = tid(); i < kTileRows * kAcross; i += kThreads) {
      const int64_t r = row + i / kAcross, c = column + i % kAcross * kPiece;
      const unsigned to = i / kAcross * kStride + i % kAcross * kPiece;
      const int64_t left = r < row_end ? column_end - c : 0;
      const int count = left >= kPiece ? kPiece : (left > 0 ? static_cast<int>(left) : 0);
      const E* const source = count > 0 ? from + r * ld + c : from;
      if (aligned) {
        cp_async16(tile, to, source, static_cast<unsigned>(count * sizeof(E)));
      } else {
        for (int e = 0; e < kPiece; ++e) st(tile, to + e, e < count ? source[e] : E{});
      }
    }
  }

  static TAPS_DEVICE bool aligned(const void* p, int64_t ld, unsigned size) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld * size % 16 == 0;
  }

  // Two neighbours of W_t in the operand's type, as the tensor core takes them.
  static TAPS_DEVICE uint32_t pair(sh<T> weight, sh<D> delta, unsigned at, bool open) {
    const T w0 = ld(weight, at), w1 = ld(weight, at + 1);
    if (!open) return w0.bits | static_cast<uint32_t>(w1.bits) << 16;
    const T low = from_f32<T>(to_f32(w0) + to_f32(ld(delta, at)));
    const T high = from_f32<T>(to_f32(w1) + to_f32(ld(delta, at + 1)));
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
  }

  static TAPS_DEVICE void run(const Args& args) {
    const bool open = args.gate == Gate::kOpen || (args.gate == Gate::kRead && *args.score >= args.threshold);
    const int64_t row = static_cast<int64_t>(bid_y()) * kRows, column = static_cast<int64_t>(bid_x()) * kColumns;
    const int64_t k_begin = bid_z() * args.k_per_split;
    const int64_t k_end = k_begin + args.k_per_split < args.k ? k_begin + args.k_per_split : args.k;
    const int64_t steps = k_end > k_begin ? (k_end - k_begin + kDepth - 1) / kDepth : 0;
    const bool fast_x = aligned(args.x, args.ldx, sizeof(T)), fast_w = aligned(args.weight, args.ldw, sizeof(T));
    const bool fast_d = aligned(args.delta, args.ldd, sizeof(D));

    const auto x_of = [](unsigned stage) { return as<T>(arena(), stage * kBytesStage); };
    const auto w_of = [](unsigned stage) { return as<T>(arena(), stage * kBytesStage + kBytesX); };
    const auto d_of = [](unsigned stage) { return as<D>(arena(), stage * kBytesStage + kBytesX + kBytesW); };
    const auto load = [&](int64_t step) {
      if (step < steps) {
        const unsigned stage = static_cast<unsigned>(step % kStages);
        const int64_t k = k_begin + step * kDepth;
        fetch<T, kRows>(x_of(stage), args.x, args.ldx, row, args.m, k, k_end, fast_x);
        fetch<T, kColumns>(w_of(stage), args.weight, args.ldw, column, args.n, k, k_end, fast_w);
        if (open) fetch<D, kColumns>(d_of(stage), args.delta, args.ldd, column, args.n, k, k_end, fast_d);
      }
      cp_commit();  // empty groups too: the waits below count them
    };

    float sum[kM][kN][4] = {};
    const unsigned group = lane() / 4, t = lane() % 4;
    const unsigned my_row = warp() / kWarpsN * kM * 16, my_column = warp() % kWarpsN * kN * 8;
    for (int64_t step = 0; step < kStages - 1; ++step) load(step);
    for (int64_t step = 0; step < steps; ++step) {
      cp_wait<kStages - 2>();
      block_sync();  // what everyone fetched for this step is there, and the stage of the last step is free
      load(step + kStages - 1);
      const unsigned stage = static_cast<unsigned>(step % kStages);
      const sh<T> x = x_of(stage), w = w_of(stage);
      const sh<D> d = d_of(stage);
#pragma unroll
      for (unsigned k = 0; k < kDepth; k += 16) {
        uint32_t a[kM][4];
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          ldsm_x4(a[i], x, (my_row + 16 * i + lane() % 16) * kStride + k + lane() / 16 * 8);
        }
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const unsigned at = (my_column + 8 * j + group) * kStride + k + 2 * t;
          const uint32_t b[2] = {pair(w, d, at, open), pair(w, d, at + 8, open)};
#pragma unroll
          for (int i = 0; i < kM; ++i) mma<T>(sum[i][j], a[i], b);
        }
      }
    }
    cp_wait<0>();

#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t r = row + my_row + 16 * i + group + 8 * (e / 2);
          const int64_t c = column + my_column + 8 * j + 2 * t + e % 2;
          if (r >= args.m || c >= args.n) continue;
          if (args.splits > 1) {
            args.partial[(bid_z() * args.m + r) * args.n + c] = sum[i][j][e];
          } else {
            const float bias = args.bias ? to_f32(args.bias[c]) : 0.0f;
            args.y[r * args.ldy + c] = from_f32<T>(sum[i][j][e] + bias);
          }
        }
      }
    }
  }

  // The sum over the splits, first to last, and the bias: one thread for each element of y.
  static TAPS_DEVICE void reduce(const Args& args) {
    const int64_t at = static_cast<int64_t>(bid_x()) * nthreads() + tid();
    if (at >= args.m * args.n) return;
    float sum = 0.0f;
    for (int split = 0; split < args.splits; ++split) sum += args.partial[split * args.m * args.n + at];
    const int64_t r = at / args.n, c = at % args.n;
    args.y[r * args.ldy + c] = from_f32<T>(sum + (args.bias ? to_f32(args.bias[c]) : 0.0f));
  }
};

}  // namespace taps::dev
