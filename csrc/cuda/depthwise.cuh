// The depthwise convolution, each channel with a kernel of its own, fused with W_t: y, dx, and G with <G, Delta>. No
// tensor cores: a thread has a vector of channels, 16 bytes, of a strip of pixels in a row. Images are [B, H, W, C],
// dense. One definition for nvcc and for the twin; the launches are in depthwise.cu.
#pragma once

#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/gate.cuh"

namespace taps::dev {

constexpr unsigned kGroupBytes = 128;    // of a pixel's channels to a block, at most: a line of the caches
constexpr int64_t kSettledElements = 8;  // of G to a block of the second pass: what a sector of a partial sum holds

template <class T>
constexpr int kChannels = static_cast<int>(16 / sizeof(T));  // of a vector

// Pixels of a strip: what is read and converted serves as many products as registers allow.
TAPS_BOTH constexpr int pixels_of_strip(Product product, int kernel, int stride) {
  if (kernel == 7) return product == Product::kWeightGradient ? 2 : 3;
  return product == Product::kForward && kernel == 5 && stride == 2 ? 2 : 4;
}

// --- vectors of channels -------------------------------------------------------------------------------------------

TAPS_DEVICE uint32_t word_of(float x) { return bits_of(x); }
template <class T>
TAPS_DEVICE uint32_t word_of(T x) {
  return x.bits;
}

// Those from `from` on, of which `left` are there; the rest are zeros.
template <class T, bool kWhole>
TAPS_DEVICE Vec16 load_channels(const T* from, int left) {
  if constexpr (kWhole) {
    return gld16(from);
  } else {
    Vec16 v{};
#pragma unroll
    for (int i = 0; i < kChannels<T>; ++i) {
      constexpr int kEach = kChannels<T> / 4;  // of a word
      if (i < left) v.word[i / kEach] |= word_of(from[i]) << (i % kEach * 16);
    }
    return v;
  }
}

template <class T>
TAPS_DEVICE void spread(const Vec16& v, float (&to)[kChannels<T>]) {
#pragma unroll
  for (int i = 0; i < kChannels<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = float_of(v.word[i]);
    } else {
      to[i] = to_f32(T{static_cast<uint16_t>(v.word[i / 2] >> 16 * (i % 2))});
    }
  }
}

template <class T, bool kWhole>
TAPS_DEVICE void store_channels(T* to, const float (&from)[kChannels<T>], int left) {
  if constexpr (!kWhole) {
#pragma unroll
    for (int i = 0; i < kChannels<T>; ++i) {
      if (i < left) to[i] = from_f32<T>(from[i]);
    }
  } else {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v.word[i] = bits_of(from[i]);
      } else {
        v.word[i] = pack<T>(from[2 * i], from[2 * i + 1]);
      }
    }
    gst16(to, v);
  }
}

// --- where a thread works ------------------------------------------------------------------------------------------

// Every `every`th strip of the block's, which are counted along rows, then down images, then through the batch. To go
// on is to carry: a division takes as long as a row of the kernel.
struct Strips {
  int left, of_row, rows;  // `left`: strips to come, where an index, its end and its step were three registers
  int column, row, image;
  int columns_on, rows_on, images_on;

  // `first`: of the thread's; `of_row`, `rows`: strips of a row, rows of an image.
  TAPS_DEVICE Strips(const Depthwise& p, unsigned first, unsigned every, int of_row, int rows)
      : of_row(of_row), rows(rows) {
    const int all = static_cast<int>(p.batch) * rows * of_row, count = static_cast<int>(p.depth_of_split);
    const int begin = static_cast<int>(bid_y()) * count, end = all - begin < count ? all : begin + count;
    const int index = begin + static_cast<int>(first), step = static_cast<int>(every);
    left = (end - index + step - 1) / step;  // none or less: no strip
    row = index / of_row, column = index - row * of_row;
    image = row / rows, row -= image * rows;
    rows_on = step / of_row, columns_on = step - rows_on * of_row;
    images_on = rows_on / rows, rows_on -= images_on * rows;
  }
  TAPS_DEVICE bool there() const { return left > 0; }
  TAPS_DEVICE void next() {
    --left, column += columns_on, row += rows_on, image += images_on;
    if (column >= of_row) column -= of_row, ++row;
    if (row >= rows) row -= rows, ++image;
  }
};

// The vector of channels that a thread has.
struct Lane {
  int64_t channel;
  int left;  // channels from there on

  TAPS_DEVICE Lane(const Depthwise& p, unsigned vector, int channels)
      : channel((static_cast<int64_t>(bid_x()) * static_cast<unsigned>(p.vectors) + vector) * channels),
        left(static_cast<int>(p.outputs - channel < channels ? p.outputs - channel : channels)) {}
};

// --- y and dx ------------------------------------------------------------------------------------------------------

// y of x, or with `kBackward` dx of dy. K: of the kernel, both ways; S: the stride along rows. The block makes W_t of
// its channels once, rounded as a rebuild rounds it, and keeps it in shared memory; a thread has one row of it in
// registers, because all of it beside the sums leaves too few. Sums are in fp32, over rows of the kernel, then over
// columns of what is read.
template <class T, int K, int S, bool kBackward>
struct DepthwiseActivation {
  static constexpr int kVector = kChannels<T>, kGroup = static_cast<int>(kGroupBytes / sizeof(T));
  static constexpr int kPixels = pixels_of_strip(kBackward ? Product::kInputGradient : Product::kForward, K, S);
  static constexpr int kColumns = kBackward ? (K - 1) / S + (kPixels - 1) / S + 1 : (kPixels - 1) * S + K;  // read
  static constexpr unsigned kShared = (K * K + 1) * kGroupBytes;  // W_t, and the bias
  static_assert(kPixels % S == 0, "a strip of the input gradient begins where the stride does");

  static TAPS_DEVICE void run(const Depthwise& p) {
    make_weight(p);
    block_sync();
    const void *const from = kBackward ? p.dy.data : p.x.data, *const to = p.result;
    if (p.outputs % kVector == 0 && aligned(from) && aligned(to)) {
      strips<true>(p);
    } else {
      strips<false>(p);
    }
  }

 private:
  // W_t of the block's channels, [K, K, kGroup], then the bias, into shared memory; channels beyond the last are zero.
  static TAPS_DEVICE void make_weight(const Depthwise& p) {
    const sh<T> taps = as<T>(arena(), 0);
    const bool open = is_open(p.gate);
    const int channels = p.vectors * kVector;
    const int64_t first = static_cast<int64_t>(bid_x()) * channels;
    for (int i = static_cast<int>(tid()); i < channels * K * K; i += static_cast<int>(nthreads())) {
      const int channel = i / (K * K), tap = i - channel * K * K;
      float value = 0.0f;
      if (first + channel < p.outputs) {
        value = load_one<float>(p.weight.data, p.weight_dtype, (first + channel) * p.weight.ld + tap);
        if (open) value += load_one<float>(p.delta.data, p.delta_dtype, (first + channel) * p.delta.ld + tap);
      }
      st(taps, static_cast<unsigned>(tap * kGroup + channel), from_f32<T>(value));
    }
    for (int i = static_cast<int>(tid()); i < channels; i += static_cast<int>(nthreads())) {
      const bool there = p.bias && first + i < p.outputs;
      st(taps, static_cast<unsigned>(K * K * kGroup + i),
         there ? static_cast<const T*>(p.bias)[first + i] : from_f32<T>(0.0f));
    }
  }

  template <bool kWhole>
  static TAPS_DEVICE void strips(const Depthwise& p) {
    const unsigned vectors = static_cast<unsigned>(p.vectors), vector = tid() % vectors;
    const Lane lane(p, vector, kVector);
    if (lane.left <= 0) return;
    const sh<T> taps = as<T>(arena(), 0) + vector * kVector;
    const int (&from_size)[2] = kBackward ? p.result_size : p.size, (&to_size)[2] = kBackward ? p.size : p.result_size;
    const int channels = static_cast<int>(p.outputs);
    const int before = kBackward ? p.padding[1] % S : 0;  // pixels of a row's first strip that are none
    const int of_row = (to_size[1] + before + kPixels - 1) / kPixels;
    for (Strips strip(p, tid() / vectors, nthreads() / vectors, of_row, to_size[0]); strip.there(); strip.next()) {
      const int first = strip.column * kPixels - before;
      const int column = kBackward ? (first + p.padding[1]) / S - (K - 1) / S : first * S - p.padding[1];
      float sum[kPixels][kVector] = {};
#pragma unroll 1
      for (int r = 0; r < K; ++r) {
        int row = strip.row * p.stride[0] - p.padding[0] + r;
        if constexpr (kBackward) {
          const int under = strip.row + p.padding[0] - r;
          row = under / p.stride[0];
          if (row * p.stride[0] != under) continue;  // between two of them
        }
        if (row < 0 || row >= from_size[0]) continue;
        Vec16 of_row_taps[K];
#pragma unroll
        for (int s = 0; s < K; ++s) of_row_taps[s] = ld16(taps, static_cast<unsigned>((r * K + s) * kGroup));
        const int64_t line = (static_cast<int64_t>(strip.image) * from_size[0] + row) * from_size[1];
        const T* const from = static_cast<const T*>(kBackward ? p.dy.data : p.x.data) + line * p.outputs + lane.channel;
        add_row<kWhole>(sum, of_row_taps, from, channels, column, from_size[1], lane.left);
      }
      if constexpr (!kBackward) {
        float bias[kVector];
        spread<T>(ld16(taps, static_cast<unsigned>(K * K * kGroup)), bias);
#pragma unroll
        for (int pixel = 0; pixel < kPixels; ++pixel) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[pixel][i] += bias[i];
        }
      }
      const int64_t line = (static_cast<int64_t>(strip.image) * to_size[0] + strip.row) * to_size[1];
      T* const to = static_cast<T*>(p.result) + line * p.outputs + lane.channel;
#pragma unroll
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        const int at = first + pixel;
        if (at >= 0 && at < to_size[1]) store_channels<T, kWhole>(to + at * channels, sum[pixel], lane.left);
      }
    }
  }

  // What a row of pixels from `column` on, of which there are `size`, adds to the strip through a row of taps.
  template <bool kWhole>
  static TAPS_DEVICE void add_row(float (&sum)[kPixels][kVector], const Vec16 (&taps)[K], const T* from, int channels,
                                  int column, int size, int left) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int at = column + j;
      Vec16 v{};
      if (at >= 0 && at < size) v = load_channels<T, kWhole>(from + at * channels, left);
      float x[kVector];
      spread<T>(v, x);
#pragma unroll
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        const int s = kBackward ? pixel - S * (j - (K - 1) / S) : j - S * pixel;
        if (s < 0 || s >= K) continue;
        float w[kVector];
        spread<T>(taps[s], w);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[pixel][i] += x[i] * w[i];
      }
    }
  }
};

// --- G -------------------------------------------------------------------------------------------------------------

TAPS_BOTH inline int64_t settling_blocks(const Depthwise& p) {
  return (p.outputs * p.inputs + kSettledElements - 1) / kSettledElements;
}
// [splits, C, K, K], behind a double for each block of the second pass.
TAPS_DEVICE float* partial_sums(const Depthwise& p) {
  return reinterpret_cast<float*>(static_cast<double*>(p.memory) + settling_blocks(p));
}

// G of a part of the pixels, in fp32, to the partial sums. A thread has a vector of channels, one row of the kernel and
// every so many strips; the threads of one vector and row are added in turn.
template <class T, int K, int S>
struct DepthwiseWeight {
  static constexpr int kVector = kChannels<T>, kPixels = pixels_of_strip(Product::kWeightGradient, K, S);
  static constexpr int kColumns = (kPixels - 1) * S + K;
  static constexpr unsigned kShared = kThreads * kVector * sizeof(float);

  static TAPS_DEVICE void run(const Depthwise& p) {
    float sum[K][kVector] = {};
    if (p.outputs % kVector == 0 && aligned(p.x.data) && aligned(p.dy.data)) {
      strips<true>(p, sum);
    } else {
      strips<false>(p, sum);
    }
    leave(p, sum);
  }

 private:
  template <bool kWhole>
  static TAPS_DEVICE void strips(const Depthwise& p, float (&sum)[K][kVector]) {
    const unsigned vectors = static_cast<unsigned>(p.vectors), rest = tid() / vectors;
    const unsigned lanes = nthreads() / (vectors * K);
    const int r = static_cast<int>(rest % K);
    const Lane lane(p, tid() % vectors, kVector);
    if (lane.left <= 0 || rest / K >= lanes) return;  // threads left over
    const int channels = static_cast<int>(p.outputs);
    const int of_row = (p.result_size[1] + kPixels - 1) / kPixels;
    for (Strips strip(p, rest / K, lanes, of_row, p.result_size[0]); strip.there(); strip.next()) {
      const int first = strip.column * kPixels;
      const int row = strip.row * p.stride[0] - p.padding[0] + r;
      if (row < 0 || row >= p.size[0]) continue;
      const int64_t line = static_cast<int64_t>(strip.image) * p.result_size[0] + strip.row;
      const T* const of_dy = static_cast<const T*>(p.dy.data) + line * p.result_size[1] * p.outputs + lane.channel;
      const T* const of_x = static_cast<const T*>(p.x.data) +
                            (static_cast<int64_t>(strip.image) * p.size[0] + row) * p.size[1] * p.outputs +
                            lane.channel;
      Vec16 dy[kPixels] = {};
#pragma unroll
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        const int at = first + pixel;
        if (at < p.result_size[1]) dy[pixel] = load_channels<T, kWhole>(of_dy + at * channels, lane.left);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int at = first * S - p.padding[1] + j;
        Vec16 v{};
        if (at >= 0 && at < p.size[1]) v = load_channels<T, kWhole>(of_x + at * channels, lane.left);
        float x[kVector];
        spread<T>(v, x);
#pragma unroll
        for (int pixel = 0; pixel < kPixels; ++pixel) {
          const int s = j - S * pixel;
          if (s < 0 || s >= K) continue;
          float by[kVector];
          spread<T>(dy[pixel], by);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[s][i] += x[i] * by[i];
        }
      }
    }
  }

  static TAPS_DEVICE void leave(const Depthwise& p, const float (&sum)[K][kVector]) {
    const sh<float> sums = as<float>(arena(), 0);
    const unsigned vectors = static_cast<unsigned>(p.vectors), each = vectors * K, lanes = nthreads() / each;
    float* const partial = partial_sums(p) + static_cast<int64_t>(bid_y()) * p.outputs * (K * K);
#pragma unroll
    for (int s = 0; s < K; ++s) {
      if (s > 0) block_sync();  // the column before has been read
#pragma unroll
      for (int i = 0; i < kVector; ++i) st(sums, static_cast<unsigned>(i) * nthreads() + tid(), sum[s][i]);
      block_sync();
      for (unsigned at = tid(); at < each * kVector; at += nthreads()) {
        const unsigned i = at / each, of = at - i * each;  // a channel of the vector; a vector and a row
        float total = 0.0f;
        for (unsigned lane = 0; lane < lanes; ++lane) total += ld(sums, i * nthreads() + lane * each + of);
        const int64_t channel = Lane(p, of % vectors, kVector).channel + i;
        if (channel < p.outputs) partial[channel * (K * K) + of / vectors * K + s] = total;
      }
    }
  }
};

constexpr unsigned kSettleShared = kThreads * sizeof(float) + kSettledElements * sizeof(double);

// The second pass: each element of G is the sum of its partial sums, 32 threads taking every 32nd, added in turn. It
// stays in fp32, where torch would round it to the compute type. g * scale * G goes to `result`, and the block's part
// of <G, Delta>, in fp64, to `memory`, whose sum is the score's gradient.
TAPS_DEVICE void settle_depthwise(const Depthwise& p) {
  constexpr unsigned kElements = kSettledElements, kLanes = kThreads / kElements;
  const sh<float> sums = as<float>(arena(), 0);
  const sh<double> dots = as<double>(arena(), kThreads * sizeof(float));
  const unsigned element = tid() % kElements, first = tid() / kElements;
  const int64_t count = p.outputs * p.inputs, at = static_cast<int64_t>(bid_x()) * kElements + element;
  const float* const partial = partial_sums(p);
  float sum = 0.0f;
  if (at < count) {
#pragma unroll 4
    for (int split = static_cast<int>(first); split < p.splits; split += kLanes) sum += partial[split * count + at];
  }
  st(sums, tid(), sum);
  block_sync();
  if (first == 0) {
    float g = 0.0f;
#pragma unroll
    for (unsigned other = 0; other < kLanes; ++other) g += ld(sums, other * kElements + element);
    double dot = 0.0;
    if (at < count) {
      const int64_t channel = at / p.inputs, tap = at - channel * p.inputs;
      if (p.score_gradient) {
        const auto delta = load_one<double>(p.delta.data, p.delta_dtype, channel * p.delta.ld + tap);
        dot = static_cast<double>(g) * delta;
      }
      if (p.result) {
        const float scaled = is_open(p.gate) ? static_cast<float>(p.scale) * g : 0.0f;
        store_one(p.result, p.delta_dtype, channel * p.ld_result + tap, scaled);
      }
    }
    st(dots, element, dot);
  }
  block_sync();
  if (tid() != 0 || !p.score_gradient) return;
  double total = 0.0;
  for (unsigned i = 0; i < kElements; ++i) total += ld(dots, i);
  static_cast<double*>(p.memory)[bid_x()] = total;
}

// --- instances and grids, on the host ------------------------------------------------------------------------------

template <class Body>
struct DepthwiseInstance {
  using type = Body;
};

template <class T, int K, int S, class Launch>
void with_depthwise(Product product, const Launch& launch) {
  if (product == Product::kForward) {
    launch(DepthwiseInstance<DepthwiseActivation<T, K, S, false>>());
  } else if (product == Product::kInputGradient) {
    launch(DepthwiseInstance<DepthwiseActivation<T, K, S, true>>());
  } else {
    launch(DepthwiseInstance<DepthwiseWeight<T, K, S>>());
  }
}
// Calls `launch` with the kernel that serves a product: by its type, kernel and stride along rows.
template <class T, class Launch>
void with_depthwise(Product product, const Depthwise& p, const Launch& launch) {
  if (p.kernel == 7) {
    with_depthwise<T, 7, 1>(product, launch);
  } else if (p.kernel == 5) {
    p.stride[1] == 1 ? with_depthwise<T, 5, 1>(product, launch) : with_depthwise<T, 5, 2>(product, launch);
  } else {
    p.stride[1] == 1 ? with_depthwise<T, 3, 1>(product, launch) : with_depthwise<T, 3, 2>(product, launch);
  }
}

struct DepthwiseGrid {
  unsigned groups = 0, splits = 0;  // of channels and of pixels: blocks in x and y
  int vectors = 1;                  // of channels to a block
  int64_t strips_of_split = 0;
  int64_t bytes = 0;  // of scratch memory
};

inline int64_t strips_of(Product product, const Depthwise& p) {
  const bool backward = product == Product::kInputGradient;
  const int64_t pixels = pixels_of_strip(product, p.kernel, p.stride[1]);
  const int64_t before = backward ? p.padding[1] % p.stride[1] : 0;
  const int32_t (&size)[2] = backward ? p.size : p.result_size;
  return p.batch * size[0] * ((size[1] + before + pixels - 1) / pixels);
}

inline int64_t bytes_of(const Depthwise& p, unsigned splits) {
  return 8 * settling_blocks(p) + 4 * static_cast<int64_t>(splits) * p.outputs * p.inputs;
}

// As many blocks as are resident at once, each with whole rounds of strips: W_t is made once for all of them. A block
// takes as many vectors of channels as leave no more than a fifth of its threads without any.
inline DepthwiseGrid plan(Product product, const Depthwise& p, int multiprocessors) {
  DepthwiseGrid grid;
  const int64_t channels = 16 / size_of(p.compute), vectors = (p.outputs + channels - 1) / channels;
  for (grid.vectors = 8; grid.vectors > 1; grid.vectors /= 2) {
    if ((vectors + grid.vectors - 1) / grid.vectors * grid.vectors * 4 <= vectors * 5) break;
  }
  grid.groups = static_cast<unsigned>((vectors + grid.vectors - 1) / grid.vectors);
  const bool gradient = product == Product::kWeightGradient;
  const int64_t round = kThreads / (grid.vectors * (gradient ? p.kernel : 1));
  const int64_t rounds = (strips_of(product, p) + round - 1) / round;
  const int64_t most = std::max<int64_t>(4 * static_cast<int64_t>(multiprocessors) / grid.groups, 1);
  const int64_t rounds_of_split = (rounds + most - 1) / most;
  grid.strips_of_split = rounds_of_split * round;
  grid.splits = static_cast<unsigned>((rounds + rounds_of_split - 1) / rounds_of_split);
  if (gradient) grid.bytes = bytes_of(p, grid.splits);
  return grid;
}

inline void set_grid(Depthwise& p, const DepthwiseGrid& grid) {
  p.vectors = grid.vectors;
  p.splits = static_cast<int>(grid.splits);
  p.depth_of_split = grid.strips_of_split;
}

}  // namespace taps::dev
