#include "fused.h"

#include <algorithm>

#include "core/device.h"

namespace taps {
namespace {

// Whether tile kernels run there. The CPU's own kernels are cpu/linear.cpp and cpu/conv2d.cpp.
bool on_tiles(Place place) { return cuda::runs(place.cuda); }

// Elements of a row next to each other in memory; for the tile kernels rows that can be read in words.
bool readable(const Described& matrix) {
  const auto address = reinterpret_cast<uintptr_t>(matrix.data());
  const int64_t step = matrix.sizes[0] > 1 ? matrix.strides[0] * size_of(matrix.dtype) : 0;
  if (matrix.ndim() != 2 || (matrix.strides[1] != 1 && matrix.sizes[1] != 1) || step < 0) return false;
  return !on_tiles(matrix.place) || (address % 4 == 0 && step % 4 == 0);
}

bool sixteen_bit(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }

Matrix matrix_of(const Described& matrix) {
  return {matrix.data(), matrix.sizes[0] > 1 ? matrix.strides[0] : 0};  // the only row may have any stride
}

void set_weight(LinearProduct& args, const GatedWeight& w, Dtype compute) {
  args.compute = compute;
  args.weight = matrix_of(w.weight);
  args.weight_dtype = w.weight.dtype;
  args.delta_dtype = w.known_closed() ? w.weight.dtype : w.delta->dtype;
  if (!w.known_closed()) args.delta = matrix_of(*w.delta);
  args.gate = w.gate;
}

Tensor contiguous(const Described& vector) {
  if (vector.numel() <= 1 || vector.strides[0] == 1) return *vector.tensor;
  const Tensor copy = empty_strided(vector.sizes, contiguous_strides(vector.sizes), vector.dtype, vector.place);
  reconstruct_into(describe(copy, "bias"), &vector, nullptr, Gate{});
  return copy;
}

OptionalTensor contiguous(const OptionalTensor& bias) {
  if (!bias) return std::nullopt;
  return contiguous(describe(*bias, "bias"));
}

const void* data_of(const OptionalTensor& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

LinearProduct product_of(const GatedWeight& w, Dtype compute, const LinearSizes& sizes) {
  LinearProduct args;
  args.rows = sizes.rows;
  args.outputs = sizes.outputs;
  args.inputs = sizes.inputs;
  set_weight(args, w, compute);
  return args;
}

// The order of a weight's row, C, kH, kW (false) or kH, kW, C (true), where its elements are next to each other.
std::optional<bool> channels_inside(const Described& weight) {
  const auto ordered = [&](std::array<size_t, 3> dims) {
    int64_t step = 1;
    for (const size_t dim : dims) {
      if (weight.sizes[dim] != 1 && weight.strides[dim] != step) return false;
      step *= weight.sizes[dim];
    }
    return weight.sizes[0] == 1 || weight.strides[0] >= 0;
  };
  if (ordered({3, 2, 1})) return false;
  if (ordered({1, 3, 2})) return true;
  return std::nullopt;
}

void run(Product product, LinearProduct& args, Place place) {
  if (!on_tiles(place)) {
    const Lease memory(false, 0, static_cast<size_t>(cpu::linear_bytes(args)));
    args.memory = memory.data();
    return cpu::linear(args);
  }
  void* const stream = stream_of(place);
  const auto bytes = static_cast<size_t>(cuda::linear_bytes(product, args, place.index));
  const Lease memory(place.cuda, place.index, bytes);
  args.memory = memory.data();
  cuda::linear(product, args, place.index, stream);
}

}  // namespace

bool fusable_activation(const Described& matrix) { return matrix.numel() > 0 && readable(matrix); }

bool fusable(Product product, const GatedWeight& w, Dtype compute, bool training) {
  if (w.weight.numel() == 0 || !readable(w.weight)) return false;
  if (!on_tiles(w.weight.place)) {
    return product == Product::kForward && !training && !w.known_closed() &&
           cpu_fuses(w.weight.dtype, w.delta->dtype, compute) && readable(*w.delta);
  }
  if (!sixteen_bit(compute)) return false;
  const Dtype weight = w.weight.dtype;
  if (weight != compute && weight != Dtype::kFloat32) return false;
  if (w.known_closed()) return true;
  const Dtype delta = w.delta->dtype;
  return readable(*w.delta) && (delta == Dtype::kFloat32 || (delta == compute && weight == compute));
}

bool fusable_gradient(const GatedWeight& w, Dtype compute) {
  if (!w.delta || !on_tiles(w.weight.place) || w.weight.numel() == 0 || !sixteen_bit(compute)) return false;
  return readable(*w.delta) && (w.delta->dtype == Dtype::kFloat32 || w.delta->dtype == compute);
}

void fused_forward_into(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes, void* y) {
  LinearProduct args = product_of(w, x.dtype, sizes);
  args.x = matrix_of(x);
  args.bias = bias;
  args.result = y;
  args.ld_result = sizes.outputs;
  run(Product::kForward, args, x.place);
}

void fused_forward(const GatedWeight& w, const Described& x, const OptionalTensor& bias, const LinearSizes& sizes,
                   void* y) {
  const OptionalTensor dense = contiguous(bias);
  fused_forward_into(w, x, data_of(dense), sizes, y);
}

bool fusable_convolution(const GatedWeight& w, const Described& x, const Geometry& geometry, bool training) {
  if (on_tiles(w.weight.place) || training || w.known_closed() || geometry.groups != 1) return false;
  const Span kernel = w.weight.sizes;
  if (x.numel() == 0 || w.weight.numel() == 0 || kernel[2] * kernel[3] > kMostPlaces) return false;
  const std::optional<bool> order = channels_inside(w.weight);
  return cpu_fuses(w.weight.dtype, w.delta->dtype, x.dtype) && order && order == channels_inside(*w.delta);
}

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

void fused_convolution_into(const GatedWeight& w, const Described& x, const void* bias, const Geometry& geometry,
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
  args.rows = result.sizes[0] * result.sizes[2] * result.sizes[3];
  args.outputs = kernel[0];
  args.inputs = kernel[1] * kernel[2] * kernel[3];
  std::copy(result.strides.begin(), result.strides.end(), args.result_strides);
  args.x.data = x.data();
  args.bias = bias;
  args.result = y;
  set_weight(args, w, x.dtype);
  const Lease memory(false, 0, static_cast<size_t>(cpu::conv2d_bytes(args)));
  args.memory = memory.data();
  cpu::conv2d(args);
}

Tensor fused_convolution(const GatedWeight& w, const Described& x, const OptionalTensor& bias,
                         const Geometry& geometry) {
  const Images result = convolved(w.weight, x, geometry);
  const auto from = static_cast<size_t>(x.ndim() == 3);
  const Tensor y = empty_strided(Span(result.sizes.data() + from, 4 - from),
                                 Span(result.strides.data() + from, 4 - from), x.dtype, x.place);
  const OptionalTensor dense = contiguous(bias);
  fused_convolution_into(w, x, data_of(dense), geometry, result, y.data_ptr());
  return y;
}

void fused_input_gradient(const GatedWeight& w, const Described& dy, const LinearSizes& sizes, void* dx) {
  LinearProduct args = product_of(w, dy.dtype, sizes);
  args.dy = matrix_of(dy);
  args.result = dx;
  args.ld_result = sizes.inputs;
  run(Product::kInputGradient, args, dy.place);
}

WeightGrads fused_weight_gradient(const WeightSide& side, const Described& dy, const Described& x,
                                  const LinearSizes& sizes) {
  const GatedWeight& w = side.w;
  LinearProduct args;
  args.rows = sizes.rows;
  args.outputs = sizes.outputs;
  args.inputs = sizes.inputs;
  args.compute = side.compute;
  args.x = matrix_of(x);
  args.dy = matrix_of(dy);
  args.gate = w.gate;
  args.scale = side.scale;
  args.delta_dtype = w.delta->dtype;
  WeightGrads grads;
  if (side.want_score) {
    grads.score = empty_like(*w.score);
    args.delta = matrix_of(*w.delta);
    args.score_gradient = grads.score->data_ptr();
    args.score_dtype = w.score->dtype;
  }
  if (side.want_delta) {
    if (w.known_closed()) {
      grads.delta = zeros_like(*w.delta);
    } else {
      grads.delta = empty_like(*w.delta);
      args.result = grads.delta->data_ptr();
      args.ld_result = describe(*grads.delta, "gradient").strides[0];
    }
  }
  run(Product::kWeightGradient, args, dy.place);
  return grads;
}

}  // namespace taps
