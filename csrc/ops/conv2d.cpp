// y = conv2d(x, W_t) + b and its gradients, the same on every device: arguments are checked once, choose() picks, and
// torch's own convolutions (cuDNN, oneDNN) run on W or on W_t in the workspace, or kernels that make W_t on its way: on
// CUDA for channels_last in 16 bits (depthwise ones in fp32, too), on the CPU without gradients.
#include <algorithm>
#include <limits>

#include "core/device.h"
#include "core/python.h"
#include "core/weight.h"
#include "ops.h"

namespace py = pybind11;

namespace taps {
namespace {

// --- what comes in, and what goes out ------------------------------------------------------------

// [h, w] each.
struct Geometry {
  Ints stride, padding, dilation;
  int64_t groups;

  int64_t output_size(int64_t input, int64_t kernel, size_t axis) const {
    const Wide span = Wide{input} + 2 * Wide{padding[axis]} - Wide{dilation[axis]} * (kernel - 1) - 1;
    return span < 0 ? 0 : static_cast<int64_t>(span / stride[axis] + 1);
  }

 private:
  using Wide = __int128;  // sizes of expanded tensors know no bounds
};

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // of what a geometry counts

Geometry check_geometry(const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                        const Described& weight) {
  const auto check_pair = [](const Ints& pair, const char* name, int64_t least) {
    const auto fits = [&](int64_t value) { return value >= least && value <= kMost; };
    if (pair.size() != 2 || !fits(pair[0]) || !fits(pair[1])) {
      fail(name, ": expected two integers of at least ", least, " and at most ", kMost, ", got ",
           shape_string(Span(pair.data(), pair.size())));
    }
  };
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  if (groups < 1 || groups > kMost || weight.sizes[0] % groups != 0) {
    fail("groups: expected a divisor of the ", weight.sizes[0], " output channels, got ", groups);
  }
  return {stride, padding, dilation, groups};
}

// [B, C, H, W], or [C, H, W] for one sample.
void check_image(const Described& image, const char* name, int64_t channels) {
  const int64_t ndim = image.ndim();
  if ((ndim != 4 && ndim != 3) || image.sizes[ndim - 3] != channels) {
    fail(name, ": expected shape [B, ", channels, ", H, W] or [", channels, ", H, W], got ", shape_string(image.sizes));
  }
}

void check_batch(const OptionalTensor& rows, const Described& image, const char* name) {
  if (rows && image.ndim() < 4) fail(name, ": expected a batch for rows, got shape ", shape_string(image.sizes));
  check_rows(rows, image, name, image.sizes[0]);
}

// The forward's result, laid out as torch would.
struct Images {
  Ints sizes, strides;  // [B, O, H, W]
  bool empty() const { return sizes[2] < 1 || sizes[3] < 1; }
  std::optional<int64_t> pixels() const {  // unless there are more than can be counted
    int64_t count = 0;
    const bool over =
        __builtin_mul_overflow(sizes[2], sizes[3], &count) || __builtin_mul_overflow(count, sizes[0], &count);
    return over ? std::nullopt : std::optional<int64_t>(count);
  }
};

Images convolved(const Described& weight, const Described& x, const Geometry& geometry) {
  Images result{{x.ndim() == 3 ? 1 : x.sizes[0], weight.sizes[0], 0, 0}, {}};
  Ints& sizes = result.sizes;
  for (size_t axis = 0; axis < 2; ++axis) {
    sizes[2 + axis] = geometry.output_size(x.sizes[x.ndim() - 2 + axis], weight.sizes[2 + axis], axis);
  }
  const bool last = channels_last(x) || channels_last(weight);
  result.strides = last ? Ints{sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]}
                        : contiguous_strides(Span(sizes.data(), 4));
  return result;
}

Tensor batched(const Tensor& image, bool single) {
  return single ? call("aten::unsqueeze", "", image, int64_t{0}) : image;
}

// --- torch's convolutions ------------------------------------------------------------------------

Tensor convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Geometry& g) {
  return call("aten::conv2d", "", input, weight, bias, g.stride, g.padding, g.dilation, g.groups);
}

// dL/dx without x: the transposed convolution, its output padded to the size that x had.
Tensor data_gradient(const Tensor& dy, const Tensor& weight, const Ints& input_size, const Described& w,
                     const Described& dy_facts, const Geometry& g) {
  Ints output_padding(2);
  const int64_t ndim = dy_facts.ndim();
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t least = (dy_facts.sizes[ndim - 2 + axis] - 1) * g.stride[axis] - 2 * g.padding[axis] +
                          g.dilation[axis] * (w.sizes[2 + axis] - 1) + 1;
    output_padding[axis] = input_size[axis] - least;
  }
  return call("aten::convolution", "", dy, weight, std::nullopt, g.stride, g.padding, g.dilation, true, output_padding,
              g.groups);
}

struct DataAndWeight {
  OptionalTensor input, weight;
};

DataAndWeight convolution_backward(const Tensor& dy, const Tensor& input, const Tensor& weight, const Geometry& g,
                                   bool want_input, bool want_weight) {
  const std::array<bool, 3> mask{want_input, want_weight, false};
  const auto stack =
      call_many<3>("aten::convolution_backward", "", dy, input, weight, std::nullopt, g.stride, g.padding, g.dilation,
                   false, Ints{0, 0}, g.groups, torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
  const Tensor results[3] = {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
                             torch::stable::detail::to<Tensor>(stack[2])};
  DataAndWeight grads;
  if (want_input) grads.input = results[0];
  if (want_weight) grads.weight = results[1];
  return grads;
}

// <G, Delta> = <conv(x, Delta), dL/dy>: an activation-sized temporary instead of a weight-sized
// one. Delta in another type is cast through the workspace, which dL/dx no longer needs by now.
Tensor score_gradient(const GatedWeight& w, const Tensor& x, const Tensor& dy, const Geometry& g, double scale,
                      Dtype compute, Scratch& scratch) {
  if (w.known_closed()) expect_finite_delta(w);
  Tensor delta = *w.delta->tensor;
  if (w.delta->dtype != compute) {
    if (!scratch.tensor) scratch = scratch_like(w.weight, compute);
    Gate none;
    reconstruct_into(describe(*scratch.tensor, "workspace"), &*w.delta, nullptr, none);
    delta = *scratch.tensor;
  }
  const Tensor moved = convolve(x, delta, std::nullopt, g);
  return dot_like(*w.score, describe(moved, "conv2d(input, delta)"), describe(dy, "grad_output"), scale);
}

// --- the fused kernels ---------------------------------------------------------------------------

// Whether elements are next to each other in these dimensions, the innermost first.
bool ordered(Span sizes, Span strides, std::initializer_list<size_t> dims) {
  int64_t step = 1;
  for (const size_t dim : dims) {
    if (sizes[dim] != 1 && strides[dim] != step) return false;
    step *= sizes[dim];
  }
  return true;
}

bool has_rows(const Described& weight, std::initializer_list<size_t> dims) {
  return ordered(weight.sizes, weight.strides, dims) && (weight.sizes[0] == 1 || weight.strides[0] >= 0);
}

// The order of a weight's row, C, kH, kW (false) or kH, kW, C (true), where its elements are next to each other.
std::optional<bool> channels_inside(const Described& weight) {
  if (has_rows(weight, {3, 2, 1})) return false;
  if (has_rows(weight, {1, 3, 2})) return true;
  return std::nullopt;
}

// Elements from one index of the image to the next; the only one may have any stride.
int64_t step_of(const Described& x, int64_t from_last) {
  const int64_t dim = x.ndim() - from_last;
  return dim >= 0 && x.sizes[dim] > 1 ? x.strides[dim] : 0;
}

// Elements from one pixel to the next where all of x lies as a matrix [pixels, channels] of rows read in words.
std::optional<int64_t> pixel_step(const Described& x) {
  const int64_t channels = x.ndim() - 3;
  if (x.sizes[channels] != 1 && x.strides[channels] != 1) return std::nullopt;
  int64_t step = 0, span = 0;  // of the pixels; of one index of the dimension to the left
  for (const int64_t from_last : {1, 2, 4}) {
    const int64_t dim = x.ndim() - from_last;
    if (dim < 0 || x.sizes[dim] == 1) continue;
    if (span == 0) step = span = x.strides[dim];
    if (x.strides[dim] != span || span <= 0) return std::nullopt;
    span *= x.sizes[dim];
  }
  return in_words(x.data(), step, x.dtype) ? std::optional<int64_t>(step) : std::nullopt;
}

// How the tile kernels take a convolution: as the linear layer of its pixels, under a kernel of one place that goes
// from pixel to pixel, or as pixels that see several (csrc/cuda/pixels.cuh).
enum class Tiled { kNot, kLinear, kPixels };

Tiled tiled(const Described& weight, const Described& x, const Geometry& geometry) {
  const Span kernel = weight.sizes;
  const bool one = kernel[2] * kernel[3] == 1 && geometry.stride == Ints{1, 1} && geometry.padding == Ints{0, 0};
  if (one && pixel_step(x)) return Tiled::kLinear;
  constexpr int64_t kFar = int64_t{1} << 24;  // what a thread adds up of these stays below 2^31
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t most = std::max({geometry.stride[axis], geometry.padding[axis], geometry.dilation[axis]});
    if (std::max(most, x.sizes[x.ndim() - 2 + axis]) > kFar) return Tiled::kNot;
  }
  const int64_t piece = 16 / size_of(x.dtype);
  if (kernel[1] % piece != 0 || step_of(x, 3) != 1 || reinterpret_cast<uintptr_t>(x.data()) % 16 != 0) {
    return Tiled::kNot;
  }
  for (const int64_t from_last : {1, 2, 4}) {
    const int64_t step = step_of(x, from_last);
    if (step % piece != 0 || (from_last < 4 && step > kMost)) return Tiled::kNot;
  }
  return Tiled::kPixels;
}

bool fusable_on_tiles(const GatedWeight& w, const Described& x, const Geometry& geometry, const Images& result) {
  if (!tiles_fuse(w.weight.dtype, w.delta->dtype, x.dtype)) return false;
  for (const Described* rows : {&w.weight, &*w.delta}) {
    const int64_t step = rows->sizes[0] > 1 ? rows->strides[0] : 0;
    if (!has_rows(*rows, {1, 3, 2}) || !in_words(rows->data(), step, rows->dtype)) return false;
  }
  const Span sizes(result.sizes.data(), 4), strides(result.strides.data(), 4);
  const int64_t pixels = result.pixels().value_or(kMost), inputs = w.weight.numel() / w.weight.sizes[0];
  if (std::max(pixels, inputs) > kMost / 2 || !ordered(sizes, strides, {1, 3, 2, 0})) return false;
  return tiled(w.weight, x, geometry) != Tiled::kNot;
}

bool fusable(const GatedWeight& w, const Described& x, const Geometry& geometry, const Images& result, bool training) {
  if (w.known_closed() || geometry.groups != 1) return false;
  const Span kernel = w.weight.sizes;
  if (x.numel() == 0 || w.weight.numel() == 0 || kernel[2] * kernel[3] > kMostPlaces) return false;
  if (on_tiles(w.weight.place)) return fusable_on_tiles(w, x, geometry, result);
  const std::optional<bool> order = channels_inside(w.weight);
  return !training && cpu_fuses(w.weight.dtype, w.delta->dtype, x.dtype) && order && order == channels_inside(*w.delta);
}

bool same_strides(const Described& tensor, Span strides) {
  for (size_t dim = 0; dim < strides.size(); ++dim) {
    if (tensor.sizes[dim] != 1 && tensor.strides[dim] != strides[dim]) return false;
  }
  return true;
}

// The result lies in pixels.
void run_on_tiles(Convolution& args, const Described& weight, const Described& x, const Geometry& geometry) {
  args.ld_result = args.outputs;
  const bool linear = tiled(weight, x, geometry) == Tiled::kLinear;
  if (linear) {
    args.x.ld = *pixel_step(x);
  } else {
    for (const int64_t from_last : {1, 2, 3, 4}) args.x_strides[4 - from_last] = step_of(x, from_last);
  }
  void* const stream = stream_of(x.place);
  const int32_t device = x.place.index;
  const LinearPlan planned = linear ? cuda::plan_linear(Product::kForward, args, device) : LinearPlan();
  const int64_t bytes = linear ? planned.bytes : cuda::conv2d_bytes(args, device);
  const Lease memory(x.place.cuda, device, static_cast<size_t>(bytes));
  args.memory = memory.data();
  if (linear) {
    cuda::linear(Product::kForward, args, planned, device, stream);
  } else {
    cuda::conv2d(args, device, stream);
  }
}

// The bias is dense or none.
void fused_forward(const GatedWeight& w, const Described& x, const void* bias, const Geometry& geometry,
                   const Images& result, void* y) {
  const Span kernel = w.weight.sizes;
  const bool single = x.ndim() == 3;
  Convolution args;
  for (size_t dim = 0; dim < 4; ++dim) {
    if (dim > 0 || !single) args.x_strides[dim] = x.strides[dim - single];
  }
  for (size_t axis = 0; axis < 2; ++axis) {
    args.size[axis] = x.sizes[x.ndim() - 2 + axis];
    args.kernel[axis] = kernel[2 + axis];
    args.stride[axis] = geometry.stride[axis];
    args.padding[axis] = geometry.padding[axis];
    args.dilation[axis] = geometry.dilation[axis];
    args.result_size[axis] = result.sizes[2 + axis];
  }
  args.channels = kernel[1];
  args.channels_inside = *channels_inside(w.weight);
  args.rows = *result.pixels();
  args.outputs = kernel[0];
  args.inputs = kernel[1] * kernel[2] * kernel[3];
  std::copy(result.strides.begin(), result.strides.end(), args.result_strides);
  args.x.data = x.data();
  args.bias = bias;
  args.result = y;
  set_weight(args, w, x.dtype);
  if (on_tiles(x.place)) return run_on_tiles(args, w.weight, x, geometry);
  const Lease memory(false, 0, static_cast<size_t>(cpu::conv2d_bytes(args)));
  args.memory = memory.data();
  cpu::conv2d(args);
}

// --- depthwise convolutions on tiles -------------------------------------------------------------

// Whether the kernels of csrc/cuda/depthwise.cuh know the types and layout of the weight, and the geometry.
bool takes_depthwise(const GatedWeight& w, Dtype compute, const Geometry& g) {
  const Span kernel = w.weight.sizes;
  if (!on_tiles(w.weight.place) || g.groups != kernel[0] || kernel[1] != 1 || kernel[2] != kernel[3]) return false;
  if (kernel[3] != 3 && kernel[3] != 5 && (kernel[3] != 7 || g.stride[1] != 1)) return false;
  for (size_t axis = 0; axis < 2; ++axis) {
    if (g.stride[axis] > 2 || g.dilation[axis] != 1 || g.padding[axis] > kMostDepthwise) return false;
  }
  const auto known = [&](const Described& operand) {  // rows of kH * kW elements
    return (operand.dtype == compute || operand.dtype == Dtype::kFloat32) && channels_inside(operand) == false;
  };
  return compute != Dtype::kFloat64 && known(w.weight) && (!w.delta || known(*w.delta));
}

Ints pixel_strides(Span sizes) { return {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]}; }

// [B, H, W, C] in memory without gaps, and few enough pixels to be counted in 32 bits.
bool in_pixels(Span sizes, Span strides) {
  if (sizes.size() != 4) return false;
  const Ints dense = pixel_strides(sizes);
  int64_t numel = 1;
  for (size_t dim = 0; dim < 4; ++dim) {
    if (sizes[dim] < 1 || (sizes[dim] != 1 && strides[dim] != dense[dim])) return false;
    if (__builtin_mul_overflow(numel, sizes[dim], &numel)) return false;
  }
  return numel / sizes[1] <= kMostDepthwise && sizes[1] * sizes[3] <= kMostDepthwise;
}
bool in_pixels(const Described& image) { return in_pixels(image.sizes, image.strides); }

// `size` and `result_size`: of x and of y, [B, C, H, W].
Depthwise depthwise_of(const GatedWeight& w, Dtype compute, const Geometry& g, Span size, Span result_size) {
  Depthwise args;
  args.batch = size[0];
  args.rows = result_size[0] * result_size[2] * result_size[3];
  args.outputs = size[1];
  args.kernel = static_cast<int32_t>(w.weight.sizes[3]);
  args.inputs = w.weight.sizes[2] * w.weight.sizes[3];
  for (size_t axis = 0; axis < 2; ++axis) {
    args.size[axis] = static_cast<int32_t>(size[2 + axis]);
    args.result_size[axis] = static_cast<int32_t>(result_size[2 + axis]);
    args.stride[axis] = static_cast<int32_t>(g.stride[axis]);
    args.padding[axis] = static_cast<int32_t>(g.padding[axis]);
  }
  set_weight(args, w, compute);
  return args;
}

void run(Product product, Depthwise& args, Place place) {
  const auto bytes = static_cast<size_t>(cuda::depthwise_bytes(product, args, place.index));
  const Lease memory(place.cuda, place.index, bytes);
  args.memory = memory.data();
  cuda::depthwise(product, args, place.index, stream_of(place));
}

Tensor depthwise_forward(const GatedWeight& w, const Described& x, const OptionalTensor& bias, const Geometry& g,
                         const Images& result) {
  const Span sizes(result.sizes.data(), 4);
  const Tensor y = empty_strided(sizes, Span(result.strides.data(), 4), x.dtype, x.place);
  Depthwise args = depthwise_of(w, x.dtype, g, x.sizes, sizes);
  const OptionalTensor dense_bias = dense(bias);
  args.x.data = x.data();
  args.bias = data_of(dense_bias);
  args.result = y.data_ptr();
  run(Product::kForward, args, x.place);
  return y;
}

Tensor depthwise_input_gradient(const GatedWeight& w, const Described& dy, const Geometry& g, const Ints& input_size) {
  const Ints sizes{dy.sizes[0], dy.sizes[1], input_size[0], input_size[1]};
  const Span size(sizes.data(), 4);
  const Ints strides = pixel_strides(size);
  const Tensor dx = empty_strided(size, Span(strides.data(), 4), dy.dtype, dy.place);
  Depthwise args = depthwise_of(w, dy.dtype, g, size, dy.sizes);
  args.dy.data = dy.data();
  args.result = dx.data_ptr();
  run(Product::kInputGradient, args, dy.place);
  return dx;
}

// g * scale * G and scale * <G, Delta>, each where `side` wants it; G stays in fp32. The weight's own gradient is not
// among them.
WeightGrads depthwise_weight_gradient(const WeightSide& side, const Described& x, const Described& dy,
                                      const Geometry& g) {
  const GatedWeight& w = side.w;
  Depthwise args = depthwise_of(w, side.compute, g, x.sizes, dy.sizes);
  args.x.data = x.data();
  args.dy.data = dy.data();
  args.delta = matrix_of(*w.delta);
  args.delta_dtype = w.delta->dtype;
  args.scale = side.scale;
  WeightGrads grads;
  if (side.want_score) {
    grads.score = empty_like(*w.score);
    args.score_gradient = grads.score->data_ptr();
    args.score_dtype = w.score->dtype;
  }
  if (side.want_delta && w.known_closed()) {
    grads.delta = zeros_like(*w.delta);
  } else if (side.want_delta) {
    grads.delta = empty_like(*w.delta);
    args.result = grads.delta->data_ptr();
    args.ld_result = matrix_of(describe(*grads.delta, "gradient")).ld;
  }
  run(Product::kWeightGradient, args, x.place);
  return grads;
}

}  // namespace

Tensor gated_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                    const OptionalTensor& bias, const Ints& stride, const Ints& padding, const Ints& dilation,
                    int64_t groups, std::optional<bool> gate, double threshold, const OptionalTensor& rows, double,
                    bool training) {
  return gated_conv2d_into(std::nullopt, input, weight, delta, score, bias, stride, padding, dilation, groups, gate,
                           threshold, rows, training);
}

Tensor gated_conv2d_into(const OptionalTensor& out, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& delta, const OptionalTensor& score, const OptionalTensor& bias,
                         const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                         std::optional<bool> gate, double threshold, const OptionalTensor& rows, bool training) {
  const NoGrad no_grad;
  const GatedWeight w = check_weight(weight, delta, score, gate, threshold, 4);
  const Geometry g = check_geometry(stride, padding, dilation, groups, w.weight);
  const Described x = check_activation(input, "input", w.weight);
  check_image(x, "input", w.weight.sizes[1] * groups);
  check_batch(rows, x, "input");
  const Images result = convolved(w.weight, x, g);
  const std::optional<int64_t> pixels = result.pixels();
  if (result.empty() || !pixels) {
    fail("input: expected a padded image no smaller than the kernel", result.empty() ? "" : ", nor beyond all memory",
         ", got shape ", shape_string(x.sizes), " for a weight of shape ", shape_string(w.weight.sizes));
  }
  const OptionalTensor b = checked_bias(bias, w.weight, x.dtype);
  const bool depthwise = takes_depthwise(w, x.dtype, g) && in_pixels(x) &&
                         in_pixels(Span(result.sizes.data(), 4), Span(result.strides.data(), 4));
  const Path path = path_for(w, x.dtype, *pixels, depthwise || fusable(w, x, g, result, training), depthwise);
  if (path == Path::kFused && depthwise) return depthwise_forward(w, x, b, g, result);
  if (path == Path::kFused) {
    const size_t from = x.ndim() == 3;
    const Span strides(result.strides.data() + from, 4 - from);
    const Tensor y = out && same_strides(describe(*out, "out"), strides)
                         ? *out
                         : empty_strided(Span(result.sizes.data() + from, 4 - from), strides, x.dtype, x.place);
    const OptionalTensor dense_bias = dense(b);
    fused_forward(w, x, data_of(dense_bias), g, result, y.data_ptr());
    return y;
  }
  Scratch scratch;
  const Tensor kernel = layer_weight(w, x.dtype, path, scratch);
  const Tensor y = convolve(input, kernel, b, g);
  return x.ndim() == 4 ? y : owned(y);  // of one image it is a view of its batch
}

Grads gated_conv2d_backward(const Tensor& grad_output, const OptionalTensor& input, const Ints& input_size,
                            const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                            std::optional<bool> gate, double threshold, const Ints& stride, const Ints& padding,
                            const Ints& dilation, int64_t groups, const std::vector<bool>& output_mask,
                            const OptionalTensor& rows, double row_scale) {
  const NoGrad no_grad;
  const GatedWeight w = check_weight(weight, delta, score, gate, threshold, 4);
  const Wanted wanted = check_mask(output_mask, w);
  const Geometry g = check_geometry(stride, padding, dilation, groups, w.weight);
  const Described dy = check_activation(grad_output, "grad_output", w.weight);
  check_image(dy, "grad_output", w.weight.sizes[0]);
  check_batch(rows, dy, "grad_output");
  const bool single = dy.ndim() == 3;
  if (input_size.size() != 2) fail("input_size: expected (H, W), got ", input_size.size(), " sizes");
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t got = dy.sizes[dy.ndim() - 2 + axis];
    const int64_t expected = g.output_size(input_size[axis], w.weight.sizes[2 + axis], axis);
    if (got != expected) {
      fail("grad_output: expected size ", expected, " on axis ", dy.ndim() - 2 + axis, " for an input of ",
           input_size[axis], ", got ", got);
    }
  }
  const Dtype compute = dy.dtype;
  if (input) {
    const Described x = check_activation(*input, "input", w.weight);
    Ints expected(dy.sizes.begin(), dy.sizes.end());
    if (rows) expected[0] = rows->numel();
    expected[expected.size() - 3] = w.weight.sizes[1] * groups;
    expected[expected.size() - 2] = input_size[0];
    expected[expected.size() - 1] = input_size[1];
    expect_shape(x, "input", Span(expected.data(), expected.size()));
    if (x.dtype != compute) {
      fail("input: expected dtype ", to_string(compute), " like grad_output, got ", to_string(x.dtype));
    }
  } else if (wanted.weight_side()) {
    fail("input: expected a tensor, weight gradients are asked for; got None");
  }

  const bool depthwise = takes_depthwise(w, compute, g);
  // Where torch would lay out dL/dx in pixels, too: as the input, if all of it is there.
  const bool depthwise_input = depthwise && in_pixels(dy) && (!input || rows || in_pixels(describe(*input, "input")));
  const int64_t pixels = dy.numel() / std::max<int64_t>(w.weight.sizes[0], 1);
  const Path path = path_for(w, compute, pixels, depthwise_input, depthwise_input);
  // A closed delta's gradient is a plain zero; without it and without dW nobody needs G, but beside dL/dx the score of
  // a layer with few weights and many pixels is cheaper to have by it: conv(x, Delta) is as large as dL/dy, at least 64
  // times as large as G, and oneDNN makes dL/dx and G together (`taps bench --groups step` shows a model of such
  // layers). Not in fp16: the sums of G over all pixels leave its range, and their infinity times a zero of Delta is a
  // NaN.
  const int64_t taken = rows && dy.sizes[0] > 0 ? dy.numel() / dy.sizes[0] * rows->numel() : dy.numel();
  constexpr int64_t kLeastTimes = 64;
  const bool score_by_gradient = wanted.score && wanted.input && !w.weight.place.cuda && compute != Dtype::kFloat16 &&
                                 w.weight.numel() * kLeastTimes <= taken;
  const auto pick = [&] { return call("aten::index_select", "", grad_output, int64_t{0}, *rows); };
  OptionalTensor picked;
  if (depthwise && rows && wanted.weight_side()) picked = pick();
  const bool fused_gradient = [&] {  // not for dW, nor for a delta's plain zero
    if (!depthwise || wanted.weight || !(wanted.score || (wanted.delta && !w.known_closed()))) return false;
    const Described of = describe(picked ? *picked : grad_output, "grad_output");
    const bool known = in_pixels(of) && in_pixels(describe(*input, "input"));
    return gradient_path_for(w, compute, of.numel() / w.weight.sizes[0], known, true) == Path::kFused;
  }();
  const bool form_gradient =
      !fused_gradient && (wanted.weight || (wanted.delta && !w.known_closed()) || score_by_gradient);
  const Tensor dy4 = batched(grad_output, single);
  const OptionalTensor x4 = input ? OptionalTensor(batched(*input, single)) : std::nullopt;
  const WeightSide side{w, wanted.delta, wanted.score, wanted.weight, row_scale, compute};
  const bool at_once = wanted.input && form_gradient && !rows;
  Scratch scratch;
  OptionalTensor dinput, gradient, dbias;

  if (wanted.input && path == Path::kFused) {
    dinput = depthwise_input_gradient(w, dy, g, input_size);
  } else if (wanted.input) {
    const Tensor kernel = layer_weight(w, compute, path, scratch);
    if (x4 && !rows) {
      const DataAndWeight both = convolution_backward(dy4, *x4, kernel, g, true, at_once);
      dinput = both.input;
      gradient = both.weight;
    } else {
      dinput = data_gradient(dy4, kernel, input_size, w.weight, dy, g);
    }
    if (single) dinput = owned(call("aten::squeeze", "dim", *dinput, int64_t{0}));
  }
  if (wanted.bias) {
    dbias = call("aten::sum", "dim_IntList", dy4, std::optional<Ints>(Ints{0, 2, 3}), false, std::nullopt);
  }

  WeightGrads grads;
  if (wanted.weight_side()) {
    const Tensor dy_taken = picked ? *picked : rows ? pick() : dy4;
    if (form_gradient && !gradient) {
      // Only the shape and the layout of the weight matter here.
      Tensor like = weight;
      if (w.weight.dtype != compute) {
        if (!scratch.tensor) scratch = scratch_like(w.weight, compute);
        like = *scratch.tensor;
      }
      gradient = convolution_backward(dy_taken, *x4, like, g, false, true).weight;
    }
    if (fused_gradient) {
      grads = depthwise_weight_gradient(side, describe(*input, "input"), describe(dy_taken, "grad_output"), g);
    } else if (gradient) {
      grads = settle(side, *gradient, Holder::kFresh);
    } else {
      if (wanted.score) grads.score = score_gradient(w, *x4, dy_taken, g, row_scale, compute, scratch);
      if (wanted.delta) grads.delta = zeros_like(*w.delta);
    }
  }
  return pack_grads(w, compute, dinput, grads, dbias);
}

// --- straight from Python ------------------------------------------------------------------------

namespace {

bool is_int(PyObject* value) { return PyLong_Check(value) && !PyBool_Check(value); }

// One int or two, as torch's functions take them; false for anything else, and for what no image has.
bool both_axes(py::handle value, int64_t least, Ints& axes) {
  constexpr long kMost = long{1} << 24;
  const bool list = PyTuple_Check(value.ptr()) || PyList_Check(value.ptr());
  const Py_ssize_t count = list ? PySequence_Fast_GET_SIZE(value.ptr()) : 1;
  if (count != 1 && count != 2) return false;
  axes.resize(2);
  for (Py_ssize_t axis = 0; axis < 2; ++axis) {
    PyObject* item = list ? PySequence_Fast_GET_ITEM(value.ptr(), count == 1 ? 0 : axis) : value.ptr();
    if (!is_int(item)) return false;
    int overflow = 0;
    const long given = PyLong_AsLongAndOverflow(item, &overflow);
    if (overflow != 0 || given < least || given > kMost) return false;
    axes[static_cast<size_t>(axis)] = given;
  }
  return true;
}

}  // namespace

py::object direct_conv2d(const Layer& layer, py::handle stride, py::handle padding, py::handle dilation,
                         py::handle groups, const Call& call) {
  Geometry geometry{};
  int overflow = 0;
  geometry.groups = is_int(groups.ptr()) ? PyLong_AsLongAndOverflow(groups.ptr(), &overflow) : 0;
  if (geometry.groups < 1 || overflow != 0 || !both_axes(stride, 1, geometry.stride) ||
      !both_axes(padding, 0, geometry.padding) || !both_axes(dilation, 1, geometry.dilation)) {
    return py::none();
  }
  const auto operands = borrow_layer(layer, call, 4);
  if (!operands) return py::none();
  const auto& [x, w, bias] = *operands;
  if (x.ndim() != 4 || w.weight.numel() == 0 || w.weight.sizes[0] % geometry.groups != 0 ||
      x.sizes[1] % geometry.groups != 0 || x.sizes[1] / geometry.groups != w.weight.sizes[1]) {
    return py::none();
  }
  if (takes_depthwise(w, x.dtype, geometry)) return py::none();  // as the operator chooses
  const Images result = convolved(w.weight, x, geometry);
  const std::optional<int64_t> pixels = result.pixels();
  if (result.empty() || !pixels) return py::none();
  const Path path = path_for(w, x.dtype, *pixels, fusable(w, x, geometry, result, call.training));
  if (path != Path::kFused) {
    const py::object weight = weight_of(layer, *operands, path);
    if (weight.is_none()) return weight;
    return stock_conv2d(layer.input, weight, layer.bias, stride, padding, dilation, groups);
  }
  if (!readable(layer, *operands)) return py::none();
  const Result y = new_result(Span(result.sizes.data(), 4), Span(result.strides.data(), 4), x.dtype);
  {
    const py::gil_scoped_release released;
    fused_forward(w, x, data_of(bias), geometry, result, y.data);
  }
  return y.tensor;
}

}  // namespace taps
