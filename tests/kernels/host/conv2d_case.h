// A gated convolution's forward on the twin, against float64: images, weights and result in allocations of their exact
// size, with NaN between pixels and in every pixel that no pixel of the result sees.
#pragma once

#include "cuda/conv2d.cuh"
#include "linear_case.h"

namespace host {

using taps::Convolution;

struct Geometry {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// Of a linear problem: m pixels of the result, n outputs, k = kH * kW * C.
struct Image : Problem {
  int64_t images, channels, size[2];
  Geometry at;
  int64_t between = 0;  // elements from one pixel's channels to the next pixel's

  Image(int64_t images_, int64_t channels_, int64_t height, int64_t width, int64_t outputs, const Geometry& geometry)
      : Problem{0, outputs, 0}, images(images_), channels(channels_), size{height, width}, at(geometry) {
    m = images * pixels(0) * pixels(1), k = channels * at.kernel[0] * at.kernel[1];
  }
  int64_t pixels(int axis) const {
    const int64_t span = size[axis] + 2 * at.padding[axis] - at.dilation[axis] * (at.kernel[axis] - 1) - 1;
    return span < 0 ? 0 : span / at.stride[axis] + 1;
  }
  std::string what() const {
    std::string text = name() + ", " + std::to_string(channels) + " channels of " + std::to_string(size[0]) + " x " +
                       std::to_string(size[1]);
    for (const auto& pair : {at.kernel, at.stride, at.padding, at.dilation}) {
      text += ", " + std::to_string(pair[0]) + " x " + std::to_string(pair[1]);
    }
    return text;
  }
  // The row of x, a matrix of pixels, that pixel `row` of the result sees through a place of the kernel; -1 for none.
  int64_t seen(int64_t row, int64_t place) const {
    const int64_t h =
        row / pixels(1) % pixels(0) * at.stride[0] - at.padding[0] + place / at.kernel[1] * at.dilation[0];
    const int64_t w = row % pixels(1) * at.stride[1] - at.padding[1] + place % at.kernel[1] * at.dilation[1];
    if (h < 0 || h >= size[0] || w < 0 || w >= size[1]) return -1;
    return (row / (pixels(0) * pixels(1)) * size[0] + h) * size[1] + w;
  }
};

// y = W_t * x + bias, by the kernel `Body`, or by the one that serves it where that is none.
template <class Body, class T, class W, class D>
std::string check_convolution(const Image& s) {
  std::mt19937 random(static_cast<unsigned>(s.m * 131071 + s.n * 8191 + s.k));
  Filled<T> x(s.images * s.size[0] * s.size[1], s.channels, s.between, 0, random, 1.0f);
  Filled<W> weight(s.n, s.k, s.padding, s.offset, random, 0.2f);
  Filled<D> delta(s.n, s.k, s.padding, s.offset, random, 0.2f);
  Filled<T> bias(1, s.n, 0, 0, random, 1.0f), out(s.m, s.n, 0, 0, random, 0.0f);
  const int64_t places = s.at.kernel[0] * s.at.kernel[1];
  std::vector<bool> used(static_cast<std::size_t>(s.images * s.size[0] * s.size[1]), false);
  for (int64_t row = 0; row < s.m; ++row) {
    for (int64_t place = 0; place < places; ++place) {
      if (s.seen(row, place) >= 0) used[static_cast<std::size_t>(s.seen(row, place))] = true;
    }
  }
  for (std::size_t pixel = 0; pixel < used.size(); ++pixel) {
    if (!used[pixel]) std::memset(x.data + static_cast<int64_t>(pixel) * x.ld, 0xff, sizeof(T) * s.channels);
  }

  const auto score = static_cast<float>(s.score);
  Convolution args;
  args.rows = s.m, args.outputs = s.n, args.inputs = s.k, args.channels = s.channels;
  for (int axis = 0; axis < 2; ++axis) {
    args.size[axis] = s.size[axis], args.result_size[axis] = s.pixels(axis);
    args.kernel[axis] = s.at.kernel[axis], args.stride[axis] = s.at.stride[axis];
    args.padding[axis] = s.at.padding[axis], args.dilation[axis] = s.at.dilation[axis];
  }
  args.x.data = x.data;
  args.x_strides[0] = s.size[0] * s.size[1] * x.ld, args.x_strides[1] = 1;
  args.x_strides[2] = s.size[1] * x.ld, args.x_strides[3] = x.ld;
  args.weight = weight.matrix();
  if (s.gate != Known::kClosed) args.delta = delta.matrix();  // a closed gate may not look at it
  if (s.bias) args.bias = bias.data;
  args.result = out.data, args.ld_result = out.ld;
  args.compute = dtype_of<T>(), args.weight_dtype = dtype_of<W>(), args.delta_dtype = dtype_of<D>();
  args.gate.open = s.gate == Known::kOpen;
  args.gate.threshold = 0.1;
  if (s.gate == Known::kRead) args.gate.score = &score;
  if (s.gate == Known::kReadDouble) args.gate.score = &s.score, args.gate.score_dtype = Dtype::kFloat64;

  std::vector<float> memory;
  std::vector<twin::Finding> found;
  if constexpr (std::is_void_v<Body>) {
    with_convolution<T>(args, [&](auto instance) {
      found = launch<typename decltype(instance)::type, T>(Product::kForward, s, args, memory);
    });
  } else {
    found = launch<Body, T>(Product::kForward, s, args, memory);
  }
  if (!found.empty()) return s.what() + none(found);

  // What the tensor core takes of them, once.
  std::vector<double> pixels(static_cast<std::size_t>(s.images * s.size[0] * s.size[1] * s.channels));
  std::vector<double> kernel(static_cast<std::size_t>(s.n * s.k));
  for (std::size_t i = 0; i < pixels.size(); ++i) {
    pixels[i] = operand<T>(x(static_cast<int64_t>(i) / s.channels, static_cast<int64_t>(i) % s.channels));
  }
  for (std::size_t i = 0; i < kernel.size(); ++i) {
    const int64_t r = static_cast<int64_t>(i) / s.k, c = static_cast<int64_t>(i) % s.k;
    const auto own = static_cast<float>(weight(r, c));
    kernel[i] = operand<T>(s.open() ? own + static_cast<float>(delta(r, c)) : own);
  }
  for (int64_t row = 0; row < s.m; ++row) {
    for (int64_t c = 0; c < s.n; ++c) {
      double want = s.bias ? bias(0, c) : 0.0, size = std::fabs(want);
      for (int64_t place = 0; place < places; ++place) {
        const int64_t pixel = s.seen(row, place);
        if (pixel < 0) continue;
        const double* const a = pixels.data() + pixel * s.channels;
        const double* const b = kernel.data() + c * s.k + place * s.channels;
        for (int64_t i = 0; i < s.channels; ++i) want += a[i] * b[i], size += std::fabs(a[i] * b[i]);
      }
      if (!(std::fabs(out(row, c) - want) <= bound<T>(s.k + args.splits, size, want))) {
        return s.what() + ": " + differs(s, row, c, want, out(row, c));
      }
    }
  }
  return "";
}

}  // namespace host
