// One product of a gated depthwise convolution on the twin, against plain loops: operands in allocations of their exact
// size. With whole numbers every sum is exact in any order, and the result is what it is to the bit.
#pragma once

#include "cuda/depthwise.cuh"
#include "cuda/dot.cuh"
#include "linear_case.h"

namespace host {

using taps::Depthwise;

struct Images {
  int64_t batch, channels, height, width;
  int kernel, stride_h, stride_w, padding_h, padding_w;
  Known gate = Known::kOpen;
  double score = 0.2;  // where the device reads it; the threshold is 0.1
  bool bias = false;
  int64_t padding = 0;  // elements between two channels of W and of Delta
  int64_t offset = 0;   // elements that x, dy and the result begin behind 16 bytes
  int splits = 0;       // 0: as planned for `multiprocessors`
  int multiprocessors = 8;
  uint64_t seed = 0;
  double scale = 1.0;
  bool result = true, dot = true;  // of the weight gradient
  bool exact = true;

  bool open() const {
    return gate == Known::kOpen || ((gate == Known::kRead || gate == Known::kReadDouble) && score >= 0.1);
  }
  std::string name() const {
    return std::to_string(batch) + " x " + std::to_string(channels) + " x " + std::to_string(height) + " x " +
           std::to_string(width) + " kernel " + std::to_string(kernel) + " / " + std::to_string(stride_h) + "," +
           std::to_string(stride_w) + " padding " + std::to_string(padding_h) + "," + std::to_string(padding_w) +
           " gate " + std::to_string(static_cast<int>(gate)) + " splits " + std::to_string(splits);
  }
};

// x or dy, y or dx: [B, H, W, C].
template <class E>
struct Picture {
  int64_t height, width, channels;
  Filled<E> pixels;
  Picture(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t offset, std::mt19937& random)
      : height(height),
        width(width),
        channels(channels),
        pixels(batch * height * width, channels, 0, offset, random, 1.0f) {}
  double operator()(int64_t b, int64_t h, int64_t w, int64_t c) const {
    return h < 0 || w < 0 || h >= height || w >= width ? 0.0 : pixels((b * height + h) * width + w, c);
  }
};

template <class T, class W, class D>
struct DepthwiseTensors {
  const Images& s;
  int64_t out_h, out_w, taps;
  std::mt19937 random;
  Picture<T> x, dy;
  Filled<T> bias;
  Filled<W> weight;
  Filled<D> delta;
  float score;
  double wide_score;
  Depthwise args;

  explicit DepthwiseTensors(const Images& s)
      : s(s),
        out_h((s.height + 2 * s.padding_h - s.kernel) / s.stride_h + 1),
        out_w((s.width + 2 * s.padding_w - s.kernel) / s.stride_w + 1),
        taps(s.kernel * s.kernel),
        random(static_cast<unsigned>(s.channels * 8191 + s.width)),
        x(s.batch, s.height, s.width, s.channels, s.offset, random),
        dy(s.batch, out_h, out_w, s.channels, s.offset, random),
        bias(1, s.channels, 0, 0, random, 1.0f),
        weight(s.channels, taps, s.padding, 0, random, 1.0f),
        delta(s.channels, taps, s.padding, 0, random, 0.1f),
        score(static_cast<float>(s.score)),
        wide_score(s.score) {
    if (s.exact) {
      x.pixels.round_to_whole(s.batch * s.height * s.width, s.channels);
      dy.pixels.round_to_whole(s.batch * out_h * out_w, s.channels);
      bias.round_to_whole(1, s.channels);
      weight.round_to_whole(s.channels, taps);
      for (int64_t c = 0; c < s.channels; ++c) {  // 512ths, so that W + Delta is rounded
        for (int64_t t = 0; t < taps; ++t) {
          delta.data[c * delta.ld + t] = from_f32<D>(std::round(512.0f * static_cast<float>(delta(c, t))) / 512.0f);
        }
      }
    }
    args.rows = s.batch * out_h * out_w, args.outputs = s.channels, args.inputs = taps;
    args.batch = s.batch, args.kernel = s.kernel;
    args.size[0] = static_cast<int32_t>(s.height), args.size[1] = static_cast<int32_t>(s.width);
    args.result_size[0] = static_cast<int32_t>(out_h), args.result_size[1] = static_cast<int32_t>(out_w);
    args.stride[0] = s.stride_h, args.stride[1] = s.stride_w;
    args.padding[0] = s.padding_h, args.padding[1] = s.padding_w;
    args.x = x.pixels.matrix(), args.dy = dy.pixels.matrix();
    args.weight = weight.matrix(), args.delta = delta.matrix();
    args.bias = s.bias ? bias.data : nullptr;
    args.compute = dtype_of<T>(), args.weight_dtype = dtype_of<W>(), args.delta_dtype = dtype_of<D>();
    args.gate.open = s.gate == Known::kOpen, args.gate.threshold = 0.1;
    if (s.gate == Known::kRead) args.gate.score = &score;
    if (s.gate == Known::kReadDouble) args.gate.score = &wide_score, args.gate.score_dtype = Dtype::kFloat64;
    args.scale = s.scale;
  }
  double tap(int64_t c, int64_t h, int64_t w) const {  // of W_t: the rebuild's rounding
    const int64_t at = h * s.kernel + w;
    const auto sum = static_cast<float>(weight(c, at)) + (s.open() ? static_cast<float>(delta(c, at)) : 0.0f);
    return to_f32(from_f32<T>(sum));
  }
  void set_splits(Product product) {
    set_grid(args, plan(product, args, s.multiprocessors));
    if (s.splits == 0) return;
    args.splits = s.splits;
    args.depth_of_split = (strips_of(product, args) + s.splits - 1) / s.splits;
  }
  unsigned groups() const {
    const int64_t of_group = args.vectors * (16 / static_cast<int64_t>(sizeof(T)));
    return static_cast<unsigned>((s.channels + of_group - 1) / of_group);
  }
  std::string run(Product product) {
    std::string wrong;
    with_depthwise<T>(product, args, [&](auto instance) {
      using Body = typename decltype(instance)::type;
      wrong = none(twin::launch(
          {groups(), static_cast<unsigned>(args.splits)}, kThreads, Body::kShared, [&] { Body::run(args); }, s.seed));
    });
    return wrong;
  }
};

inline std::string differs(const std::string& what, double want, double got) {
  return "expected " + std::to_string(want) + " " + what + ", got " + std::to_string(got);
}

// y or dx.
template <class T, class W, class D>
std::string check_depthwise(Product product, const Images& s) {
  DepthwiseTensors<T, W, D> t(s);
  ++problems();
  if (!s.open()) {  // nothing may read it
    std::fill_n(reinterpret_cast<unsigned char*>(t.delta.data), (s.channels * t.delta.ld - s.padding) * sizeof(D),
                0xff);
    if (s.gate == Known::kClosed) t.args.delta = {};
  }
  const bool forward = product == Product::kForward;
  const int64_t height = forward ? t.out_h : s.height, width = forward ? t.out_w : s.width;
  Filled<T> result(s.batch * height * width, s.channels, 0, s.offset, t.random, 1.0f);
  std::fill_n(reinterpret_cast<unsigned char*>(result.data), s.batch * height * width * s.channels * sizeof(T), 0xff);
  t.args.result = result.data;
  t.set_splits(product);
  if (std::string wrong = t.run(product); !wrong.empty()) return s.name() + ": " + wrong;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < height; ++h) {
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t c = 0; c < s.channels; ++c) {
          double want = forward && s.bias ? t.bias(0, c) : 0.0, size = std::fabs(want);
          for (int64_t i = 0; i < s.kernel; ++i) {
            for (int64_t j = 0; j < s.kernel; ++j) {
              double of = 0.0;
              if (forward) {
                of = t.x(b, h * s.stride_h - s.padding_h + i, w * s.stride_w - s.padding_w + j, c);
              } else if ((h + s.padding_h - i) % s.stride_h == 0 && (w + s.padding_w - j) % s.stride_w == 0) {
                of = t.dy(b, (h + s.padding_h - i) / s.stride_h, (w + s.padding_w - j) / s.stride_w, c);
              }
              want += of * t.tap(c, i, j), size += std::fabs(of * t.tap(c, i, j));
            }
          }
          const double got = result((b * height + h) * width + w, c);
          const double rounded = to_f32(from_f32<T>(static_cast<float>(want)));
          // Of whole numbers every sum is exact; else products and sums in fp32, one rounding in the end.
          const bool good = s.exact ? got == rounded : std::fabs(got - want) <= bound<T>(2 * t.taps + 1, size, want);
          if (!good)
            return s.name() + ": " + differs("at pixel " + std::to_string(h) + "," + std::to_string(w), want, got);
        }
      }
    }
  }
  return "";
}

// Delta's gradient and the score's, in three orders of the threads: the same bits.
template <class T, class D>
std::string check_depthwise_weight(const Images& s) {
  DepthwiseTensors<T, T, D> t(s);
  ++problems();
  t.set_splits(Product::kWeightGradient);
  const auto bytes = static_cast<std::size_t>(bytes_of(t.args, static_cast<unsigned>(t.args.splits)));
  Filled<D> result(s.channels, t.taps, s.padding, 0, t.random, 1.0f);
  const auto size_of_result = static_cast<std::size_t>(s.channels * result.ld - s.padding) * sizeof(D);
  std::vector<unsigned char> earlier;
  double dot = 0.0;
  t.args.result = s.result ? result.data : nullptr, t.args.ld_result = result.ld;
  t.args.score_gradient = s.dot ? &dot : nullptr, t.args.score_dtype = Dtype::kFloat64;
  for (uint64_t seed = 0; seed < (s.exact ? 1 : 3); ++seed) {
    const std::unique_ptr<void, decltype(&std::free)> memory(std::malloc(bytes), &std::free);
    std::memset(memory.get(), 0xff, bytes), std::memset(result.data, 0xff, size_of_result);
    t.args.memory = memory.get();
    std::string wrong = t.run(Product::kWeightGradient);
    const auto blocks = static_cast<unsigned>(settling_blocks(t.args));
    if (wrong.empty())
      wrong = none(twin::launch({blocks}, kThreads, kSettleShared, [&] { settle_depthwise(t.args); }, seed + s.seed));
    if (wrong.empty() && s.dot) {
      wrong = none(twin::launch({1}, kThreads, kDotShared, [&] {
        dot_finish(static_cast<const double*>(t.args.memory), blocks, s.scale, &dot, Dtype::kFloat64);
      }));
    }
    if (!wrong.empty()) return s.name() + ": " + wrong;
    std::vector<unsigned char> now(size_of_result + sizeof(double));
    std::memcpy(now.data(), result.data, size_of_result), std::memcpy(now.data() + size_of_result, &dot, sizeof(dot));
    if (seed > 0 && now != earlier) return s.name() + ": expected the same bits in another order";
    earlier = now;
  }
  double want_dot = 0.0, dot_size = 0.0;
  const int64_t pixels = s.batch * t.out_h * t.out_w;
  const auto terms = static_cast<double>(2 * pixels);
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t at = 0; at < t.taps; ++at) {
      double g = 0.0, size = 0.0;
      for (int64_t b = 0; b < s.batch; ++b) {
        for (int64_t h = 0; h < t.out_h; ++h) {
          for (int64_t w = 0; w < t.out_w; ++w) {
            const double one = t.dy(b, h, w, c) * t.x(b, h * s.stride_h - s.padding_h + at / s.kernel,
                                                      w * s.stride_w - s.padding_w + at % s.kernel, c);
            g += one, size += std::fabs(one);
          }
        }
      }
      want_dot += g * t.delta(c, at), dot_size += size * std::fabs(t.delta(c, at));
      if (!s.result) continue;
      const double got = result(c, at), want = s.open() ? s.scale * g : 0.0;
      const double rounded = to_f32(from_f32<D>(static_cast<float>(want)));
      const bool good =
          s.exact ? got == rounded : std::fabs(got - want) <= bound<D>(2 * pixels + 2, s.scale * size, want);
      if (!good) return s.name() + ": " + differs("in Delta's gradient", want, got);
    }
  }
  // G in fp32, its products with Delta and their sums in fp64.
  const double bound_of_dot = s.exact ? 0.0 : s.scale * dot_size * (terms + 2) * 0x1p-24;
  if (s.dot && !(std::fabs(dot - s.scale * want_dot) <= bound_of_dot))
    return s.name() + ": " + differs("for the score", s.scale * want_dot, dot);
  return "";
}

}  // namespace host
