#include "core/linear.h"

#include <algorithm>

#include "core/device.h"
#include "cpu/isa.h"

namespace taps {

// --- what comes in, and what goes out ------------------------------------------------------------

LinearSizes check_linear(const Described& activation, const char* name, const Described& weight, int64_t width) {
  const int64_t ndim = activation.ndim();
  if (ndim < 1 || activation.sizes[ndim - 1] != width) {
    fail(name, ": expected shape [..., ", width, "] for a weight of shape ", shape_string(weight.sizes), ", got ",
         shape_string(activation.sizes));
  }
  LinearSizes sizes;
  for (int64_t dim = 0; dim + 1 < ndim; ++dim) sizes.rows *= activation.sizes[dim];
  sizes.outputs = weight.sizes[0];
  sizes.inputs = weight.sizes[1];
  return sizes;
}

Tensor as_matrix(const Described& activation, int64_t rows, int64_t columns) {
  const int64_t ndim = activation.ndim();
  if (ndim == 2) return *activation.tensor;
  bool even = true;
  int64_t step = columns, span = 0;  // of the rows; of one index of the dimension to the left
  for (int64_t dim = ndim - 2; dim >= 0; --dim) {
    if (activation.sizes[dim] == 1) continue;
    if (span == 0) {
      step = span = activation.strides[dim];
    }
    even = even && activation.strides[dim] == span && span > 0;
    span *= activation.sizes[dim];
  }
  const int64_t sizes[2] = {rows, columns};
  const int64_t strides[2] = {step, activation.strides[ndim - 1]};
  if (even && rows > 0) return reshaped(*activation.tensor, Span(sizes, 2), Span(strides, 2));
  return call("aten::reshape", "", *activation.tensor, Ints{rows, columns});
}

Tensor transposed(const Tensor& matrix) {
  const int64_t sizes[2] = {matrix.size(1), matrix.size(0)};
  const int64_t strides[2] = {matrix.stride(1), matrix.stride(0)};
  return reshaped(matrix, Span(sizes, 2), Span(strides, 2));
}

Ints activation_shape(const Described& like, int64_t columns) {
  Ints shape(like.sizes.begin(), like.sizes.end());
  shape.back() = columns;
  return shape;
}

Tensor activation(const Described& like, int64_t columns) {
  const Ints shape = activation_shape(like, columns);
  const Span sizes(shape.data(), shape.size());
  return empty_strided(sizes, contiguous_strides(sizes), like.dtype, like.place);
}

Tensor input_matrix(const OptionalTensor& input, const Described& dy, const Described& weight,
                    const OptionalTensor& rows) {
  if (!input) fail("input: expected a tensor, weight gradients are asked for; got None");
  const Described x = check_activation(*input, "input", weight);
  const LinearSizes sizes = check_linear(x, "input", weight, weight.sizes[1]);
  const Ints expected = rows ? Ints{rows->numel(), sizes.inputs} : activation_shape(dy, sizes.inputs);
  expect_shape(x, "input", Span(expected.data(), expected.size()));
  if (x.dtype != dy.dtype) {
    fail("input: expected dtype ", to_string(dy.dtype), " like grad_output, got ", to_string(x.dtype));
  }
  return as_matrix(x, sizes.rows, sizes.inputs);
}

Tensor matrix_view(const Tensor& activation, int64_t rows, int64_t columns) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {std::max<int64_t>(columns, 1), 1};
  return reshaped(activation, Span(sizes, 2), Span(strides, 2));
}

// --- the fused kernels ---------------------------------------------------------------------------

namespace {

bool sixteen_bit(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }

// Whether they know the types and layout of the weight, and of an activation.
bool fusable(Product product, const GatedWeight& w, Dtype compute, bool training) {
  if (w.weight.numel() == 0 || !in_rows(w.weight)) return false;
  if (!on_tiles(w.weight.place)) {
    return product == Product::kForward && !training && !w.known_closed() &&
           cpu_fuses(w.weight.dtype, w.delta->dtype, compute) && in_rows(*w.delta);
  }
  if (w.known_closed()) return tiles_fuse(w.weight.dtype, Dtype::kFloat32, compute);
  return in_rows(*w.delta) && tiles_fuse(w.weight.dtype, w.delta->dtype, compute);
}

// The weight gradient does not read the weight.
bool fusable_gradient(const GatedWeight& w, Dtype compute) {
  if (!w.delta || !on_tiles(w.weight.place) || w.weight.numel() == 0 || !sixteen_bit(compute)) return false;
  return in_rows(*w.delta) && (w.delta->dtype == Dtype::kFloat32 || w.delta->dtype == compute);
}

LinearProduct product_of(const LinearSizes& sizes, Dtype compute) {
  LinearProduct args;
  args.rows = sizes.rows;
  args.outputs = sizes.outputs;
  args.inputs = sizes.inputs;
  args.compute = compute;
  return args;
}

void run(Product product, LinearProduct& args, Place place) {
  if (!on_tiles(place)) {
    const Lease memory(false, 0, static_cast<size_t>(cpu::linear_bytes(args)));
    args.memory = memory.data();
    return cpu::linear(args);
  }
  void* const stream = stream_of(place);
  const LinearPlan planned = cuda::plan_linear(product, args, place.index);
  const Lease memory(place.cuda, place.index, static_cast<size_t>(planned.bytes));
  args.memory = memory.data();
  cuda::linear(product, args, planned, place.index, stream);
}

// dy [M, N] to dx [M, K].
void fused_input_gradient(const GatedWeight& w, const Described& dy, const LinearSizes& sizes, void* dx) {
  LinearProduct args = product_of(sizes, dy.dtype);
  set_weight(args, w, dy.dtype);
  args.dy = matrix_of(dy);
  args.result = dx;
  args.ld_result = sizes.inputs;
  run(Product::kInputGradient, args, dy.place);
}

// g * scale * G and scale * <G, Delta>, each where `side` wants it. The weight's own gradient is not among them.
WeightGrads fused_weight_gradient(const WeightSide& side, const Described& dy, const Described& x,
                                  const LinearSizes& sizes) {
  const GatedWeight& w = side.w;
  LinearProduct args = product_of(sizes, side.compute);
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

}  // namespace

bool fusable_activation(const Described& matrix) { return matrix.numel() > 0 && in_rows(matrix); }

// --- the forward ---------------------------------------------------------------------------------

LinearProduct forward_product(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes,
                              void* y) {
  LinearProduct args = product_of(sizes, x.dtype);
  set_weight(args, w, x.dtype);
  args.x = matrix_of(x);
  args.bias = bias;
  args.result = y;
  args.ld_result = sizes.outputs;
  return args;
}

void fused_forward(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes, void* y) {
  LinearProduct args = forward_product(w, x, bias, sizes, y);
  run(Product::kForward, args, x.place);
}

void packed_forward(const GatedWeight& w, const PackedDelta& delta, const Described& x, const void* bias,
                    const LinearSizes& sizes, void* y) {
  LinearProduct args = product_of(sizes, x.dtype);
  args.weight = matrix_of(w.weight);
  args.weight_dtype = w.weight.dtype;
  args.packed = delta;
  args.gate.open = true;
  args.delta_dtype = Dtype::kFloat32;
  args.x = matrix_of(x);
  args.bias = bias;
  args.result = y;
  args.ld_result = sizes.outputs;
  run(Product::kForward, args, x.place);
}

bool asks_for_matrix(const GatedWeight& w, Dtype compute, int64_t rows, bool training) {
  return fusable(Product::kForward, w, compute, training) && may_fuse(w, compute, rows);
}

Path forward_path(const GatedWeight& w, Dtype compute, int64_t rows, bool training,
                  const std::optional<Described>& matrix) {
  const bool known = matrix ? fusable_activation(*matrix) : fusable(Product::kForward, w, compute, training);
  return path_for(w, compute, rows, known);
}

void linear_into(const GatedWeight& w, const Tensor& x, const OptionalTensor& bias, bool training, const Tensor& y,
                 Scratch& scratch) {
  const Described matrix = describe(x, "input");
  const LinearSizes sizes{matrix.sizes[0], matrix.sizes[1], w.weight.sizes[0]};
  std::optional<Described> known;
  if (asks_for_matrix(w, matrix.dtype, sizes.rows, training)) known = matrix;
  const Path path = forward_path(w, matrix.dtype, sizes.rows, training, known);
  if (path == Path::kFused) {
    const OptionalTensor dense_bias = dense(bias);
    return fused_forward(w, matrix, data_of(dense_bias), sizes, y.data_ptr());
  }
  call("aten::linear", "out", x, layer_weight(w, matrix.dtype, path, scratch), bias, y);
}

// --- the gradients -------------------------------------------------------------------------------

void input_gradient_into(const GatedWeight& w, const Tensor& dy, const Tensor& dx, Scratch& scratch) {
  const Described matrix = describe(dy, "grad_output");
  const LinearSizes sizes{matrix.sizes[0], w.weight.sizes[1], matrix.sizes[1]};
  const bool known = fusable(Product::kInputGradient, w, matrix.dtype, true) && fusable_activation(matrix);
  const Path path = path_for(w, matrix.dtype, sizes.rows, known);
  if (path == Path::kFused) return fused_input_gradient(w, matrix, sizes, dx.data_ptr());
  call("aten::mm", "out", dy, layer_weight(w, matrix.dtype, path, scratch), dx);
}

WeightGrads weight_gradients(const WeightSide& side, const Tensor& dy, const Tensor& x, Scratch& scratch) {
  const GatedWeight& w = side.w;
  const Described rows_dy = describe(dy, "grad_output"), rows_x = describe(x, "input");
  const LinearSizes sizes{rows_x.sizes[0], rows_x.sizes[1], rows_dy.sizes[1]};
  const bool known = !side.want_weight && fusable_gradient(w, side.compute) && fusable_activation(rows_dy) &&
                     fusable_activation(rows_x);
  if (gradient_path_for(w, side.compute, sizes.rows, known) == Path::kFused) {
    return fused_weight_gradient(side, rows_dy, rows_x, sizes);
  }
  const Holder holder = holder_for(side);
  if (holder == Holder::kScratch && !scratch.tensor) scratch = scratch_like(w.weight, side.compute);
  const Tensor g = holder == Holder::kDelta    ? empty_like(*w.delta)
                   : holder == Holder::kWeight ? empty_like(w.weight)
                                               : *scratch.tensor;
  call("aten::mm", "out", transposed(dy), x, g);
  return settle(side, g, holder);
}

}  // namespace taps
