// y = x W_t^T + b and its gradients, the same on every device: arguments are checked once, choose() picks, and torch's
// own products (cuBLAS, oneDNN, MKL) run on W or on W_t in the workspace, or kernels that make W_t on its way.
//
// On CUDA those are all three products, in 16 bits; on the CPU the forward, in fp32 and bf16, unless gradients are
// asked for: training is to the bit what it is on whole weights.
#include <algorithm>

#include "core/device.h"
#include "core/python.h"
#include "core/weight.h"
#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;

namespace taps {
namespace {

// M rows; the layer is [N, K].
struct LinearSizes {
  int64_t rows = 1;
  int64_t inputs = 0;
  int64_t outputs = 0;
};

// --- what comes in, and what goes out ------------------------------------------------------------

// x [..., K] with W [N, K]; `name` is the activation that is checked, `width` its last size.
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

// [..., C] as [rows, C]: a view where the leading dimensions lie evenly, else a copy.
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

// A new activation like another one, with `columns` last.
Tensor activation(const Described& like, int64_t columns) {
  const Ints shape = activation_shape(like, columns);
  const Span sizes(shape.data(), shape.size());
  return empty_strided(sizes, contiguous_strides(sizes), like.dtype, like.place);
}

// The input of the forward as a matrix [M, K], or the rows of it that were picked.
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

// --- the fused kernels ---------------------------------------------------------------------------

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

bool fusable_activation(const Described& matrix) { return matrix.numel() > 0 && in_rows(matrix); }

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
  const auto bytes = static_cast<size_t>(cuda::linear_bytes(product, args, place.index));
  const Lease memory(place.cuda, place.index, bytes);
  args.memory = memory.data();
  cuda::linear(product, args, place.index, stream);
}

// x [M, K] to y [M, N]; the bias is dense or none.
void fused_forward(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes, void* y) {
  LinearProduct args = product_of(sizes, x.dtype);
  set_weight(args, w, x.dtype);
  args.x = matrix_of(x);
  args.bias = bias;
  args.result = y;
  args.ld_result = sizes.outputs;
  run(Product::kForward, args, x.place);
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

// --- the forward's path --------------------------------------------------------------------------

// Whether the input's layout decides: only then may it be worth a copy to have it as a matrix.
bool asks_for_matrix(const GatedWeight& w, Dtype compute, int64_t rows, bool training) {
  return fusable(Product::kForward, w, compute, training) && may_fuse(w, compute, rows);
}

// `matrix`: the input as one, where that was asked for.
Path forward_path(const GatedWeight& w, Dtype compute, int64_t rows, bool training,
                  const std::optional<Described>& matrix) {
  const bool known = matrix ? fusable_activation(*matrix) : fusable(Product::kForward, w, compute, training);
  return path_for(w, compute, rows, known);
}

}  // namespace

Tensor gated_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                    const OptionalTensor& bias, std::optional<bool> gate, double threshold, const OptionalTensor& rows,
                    double, bool training) {
  const NoGrad no_grad;
  const GatedWeight w = check_weight(weight, delta, score, gate, threshold, 2);
  const Described x = check_activation(input, "input", w.weight);
  const LinearSizes sizes = check_linear(x, "input", w.weight, w.weight.sizes[1]);
  check_rows(rows, x, "input", sizes.rows);
  const OptionalTensor b = checked_bias(bias, w.weight, x.dtype);

  OptionalTensor x2;
  std::optional<Described> matrix;
  if (asks_for_matrix(w, x.dtype, sizes.rows, training)) {
    x2 = as_matrix(x, sizes.rows, sizes.inputs);
    matrix = describe(*x2, "input");
  }
  const Path path = forward_path(w, x.dtype, sizes.rows, training, matrix);
  if (path == Path::kFused) {
    const Tensor y = activation(x, sizes.outputs);
    const OptionalTensor dense_bias = dense(b);
    fused_forward(w, *matrix, data_of(dense_bias), sizes, y.data_ptr());
    return y;
  }
  Scratch scratch;
  const Tensor whole = layer_weight(w, x.dtype, path, scratch);
  const Tensor y = call("aten::linear", "", input, whole, b);
  return x.ndim() == 2 ? y : owned(y);  // of other shapes it is a view of its matrix
}

Tensor packed_linear(const Tensor& input, const Tensor& weight, const Tensor& codes, const Tensor& values,
                     const std::string& codec, const OptionalTensor& bias) {
  const NoGrad no_grad;
  const GatedWeight w = check_weight(weight, std::nullopt, std::nullopt, true, 0.0, 2);
  const Described x = check_activation(input, "input", w.weight);
  const LinearSizes sizes = check_linear(x, "input", w.weight, w.weight.sizes[1]);
  const PackedDelta delta = check_packed(w.weight, codes, values, codec);
  const OptionalTensor b = checked_bias(bias, w.weight, x.dtype);
  if (sizes.rows < 1 || sizes.rows > cpu::kFewRows || sizes.inputs % 64 != 0 || sizes.inputs == 0 ||
      sizes.outputs == 0 || !in_rows(w.weight) || !cpu_fuses(w.weight.dtype, Dtype::kFloat32, x.dtype)) {
    fail("input: expected 1 to ", cpu::kFewRows, " rows of a multiple of 64 elements, in float32 or bfloat16");
  }
  const Tensor x2 = as_matrix(x, sizes.rows, sizes.inputs);
  const Described described = describe(x2, "input");
  const Tensor rows = fusable_activation(described) ? x2 : call("aten::contiguous", "", x2, int32_t{0});
  LinearProduct args = product_of(sizes, x.dtype);
  args.weight = matrix_of(w.weight);
  args.weight_dtype = w.weight.dtype;
  args.packed = delta;
  args.gate.open = true;
  args.delta_dtype = Dtype::kFloat32;
  args.x = matrix_of(describe(rows, "input"));
  const OptionalTensor dense_bias = dense(b);
  args.bias = data_of(dense_bias);
  const Tensor y = activation(x, sizes.outputs);
  args.result = y.data_ptr();
  args.ld_result = sizes.outputs;
  run(Product::kForward, args, x.place);
  return y;
}

Grads gated_linear_backward(const Tensor& grad_output, const OptionalTensor& input, const Tensor& weight,
                            const OptionalTensor& delta, const OptionalTensor& score, std::optional<bool> gate,
                            double threshold, const std::vector<bool>& output_mask, const OptionalTensor& rows,
                            double row_scale) {
  const NoGrad no_grad;
  const GatedWeight w = check_weight(weight, delta, score, gate, threshold, 2);
  const Wanted wanted = check_mask(output_mask, w);
  const Described dy = check_activation(grad_output, "grad_output", w.weight);
  const LinearSizes sizes = check_linear(dy, "grad_output", w.weight, w.weight.sizes[0]);
  check_rows(rows, dy, "grad_output", sizes.rows);
  const Dtype compute = dy.dtype;
  OptionalTensor x2;
  if (wanted.weight_side()) x2 = input_matrix(input, dy, w.weight, rows);
  const Tensor dy2 = as_matrix(dy, sizes.rows, sizes.outputs);
  const Described dy_matrix = describe(dy2, "grad_output");
  const bool dy_known = fusable_activation(dy_matrix);
  Scratch scratch;

  OptionalTensor dinput;
  if (wanted.input) {
    const bool known = fusable(Product::kInputGradient, w, compute, true) && dy_known;
    const Path path = path_for(w, compute, sizes.rows, known);
    dinput = activation(dy, sizes.inputs);
    if (path == Path::kFused) {
      fused_input_gradient(w, dy_matrix, sizes, dinput->data_ptr());
    } else {
      const int64_t shape[2] = {sizes.rows, sizes.inputs}, strides[2] = {std::max<int64_t>(sizes.inputs, 1), 1};
      call("aten::mm", "out", dy2, layer_weight(w, compute, path, scratch),
           reshaped(*dinput, Span(shape, 2), Span(strides, 2)));
    }
  }

  OptionalTensor dbias;
  if (wanted.bias) {
    dbias = call("aten::sum", "dim_IntList", dy2, std::optional<Ints>(Ints{0}), false, std::nullopt);
  }

  WeightGrads grads;
  const WeightSide side{w, wanted.delta, wanted.score, wanted.weight, row_scale, compute};
  // Known to be closed: no product is needed for a delta's zero gradient.
  if (wanted.score || wanted.weight || (wanted.delta && !w.known_closed())) {
    const int64_t taken = x2->size(0);  // rows that the weight side is estimated from
    const Tensor dy_taken = rows ? call("aten::index_select", "", dy2, int64_t{0}, *rows) : dy2;
    const bool dy_taken_known = rows ? sizes.outputs * size_of(compute) % 4 == 0 : dy_known;
    const bool known =
        !wanted.weight && fusable_gradient(w, compute) && dy_taken_known && fusable_activation(describe(*x2, "input"));
    if (gradient_path_for(w, compute, taken, known) == Path::kFused) {
      const LinearSizes of_taken{taken, sizes.inputs, sizes.outputs};
      grads = fused_weight_gradient(side, describe(dy_taken, "grad_output"), describe(*x2, "input"), of_taken);
    } else {
      const Holder holder = holder_for(side);
      if (holder == Holder::kScratch && !scratch.tensor) scratch = scratch_like(w.weight, compute);
      const Tensor g = holder == Holder::kDelta    ? empty_like(*w.delta)
                       : holder == Holder::kWeight ? empty_like(w.weight)
                                                   : *scratch.tensor;
      call("aten::mm", "out", transposed(dy_taken), *x2, g);
      grads = settle(side, g, holder);
    }
  } else if (wanted.delta) {
    grads.delta = zeros_like(*w.delta);
  }
  return pack_grads(w, compute, dinput, grads, dbias);
}

// --- straight from Python ------------------------------------------------------------------------

namespace {

// x [..., K] as [M, K]: a matrix as it is, anything else where it is dense.
std::optional<Described> borrowed_matrix(const Described& x, std::array<int64_t, 4>& facts) {
  if (x.ndim() == 2) return x;
  int64_t step = 1;
  for (size_t dim = x.sizes.size(); dim-- > 0;) {
    if (x.sizes[dim] != 1 && x.strides[dim] != step) return std::nullopt;
    step *= x.sizes[dim];
  }
  const int64_t inputs = x.sizes[x.sizes.size() - 1];
  facts = {x.numel() / inputs, inputs, inputs, 1};
  Described matrix = x;
  matrix.sizes = Span(facts.data(), 2);
  matrix.strides = Span(facts.data() + 2, 2);
  return matrix;
}

}  // namespace

py::object direct_linear(const Layer& layer, const Call& call) {
  const auto operands = borrow_layer(layer, call, 2);
  if (!operands) return py::none();
  const auto& [x, w, bias] = *operands;
  const int64_t inputs = w.weight.sizes[1], outputs = w.weight.sizes[0];
  if (x.ndim() == 0 || inputs == 0 || outputs == 0 || x.sizes[x.sizes.size() - 1] != inputs) return py::none();
  const LinearSizes sizes{x.numel() / inputs, inputs, outputs};
  std::array<int64_t, 4> facts;
  std::optional<Described> matrix;
  if (asks_for_matrix(w, x.dtype, sizes.rows, call.training)) {
    matrix = borrowed_matrix(x, facts);
    if (!matrix) return py::none();  // the operator copies it
  }
  const Path path = forward_path(w, x.dtype, sizes.rows, call.training, matrix);
  if (path != Path::kFused) {
    const py::object whole = weight_of(layer, *operands, path);
    if (whole.is_none()) return whole;
    py::object y = stock_linear(layer.input, whole, layer.bias);
    return x.ndim() == 2 || y.is_none() ? y : owned(y);  // of other shapes it is a view of its matrix
  }
  if (!readable(layer, *operands)) return py::none();
  const Ints shape = activation_shape(x, outputs);
  const Span result(shape.data(), shape.size());
  const Ints strides = contiguous_strides(result);
  const Result y = new_result(result, Span(strides.data(), strides.size()), x.dtype);
  {
    const py::gil_scoped_release released;
    fused_forward(w, *matrix, data_of(bias), sizes, y.data);
  }
  return y.tensor;
}

}  // namespace taps
