// y = x W_t^T + b and its gradients, the same on every device: arguments are checked once, choose() picks, and torch's
// own products (cuBLAS, oneDNN, MKL) run on W or on W_t in the workspace, or kernels that make W_t on its way.
//
// On CUDA those are all three products, in 16 bits; on the CPU the forward, in fp32 and bf16, unless gradients are
// asked for: training is to the bit what it is on whole weights.
#include "core/linear.h"

#include "core/python.h"
#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;

namespace taps {
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
  const OptionalTensor dense_bias = dense(b);
  const Tensor y = activation(x, sizes.outputs);
  packed_forward(w, delta, describe(rows, "input"), data_of(dense_bias), sizes, y.data_ptr());
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
  Scratch scratch;

  OptionalTensor dinput;
  if (wanted.input) {
    dinput = activation(dy, sizes.inputs);
    input_gradient_into(w, dy2, matrix_view(*dinput, sizes.rows, sizes.inputs), scratch);
  }

  OptionalTensor dbias;
  if (wanted.bias) {
    dbias = call("aten::sum", "dim_IntList", dy2, std::optional<Ints>(Ints{0}), false, std::nullopt);
  }

  WeightGrads grads;
  const WeightSide side{w, wanted.delta, wanted.score, wanted.weight, row_scale, compute};
  // Known to be closed: no product is needed for a delta's zero gradient.
  if (wanted.score || wanted.weight || (wanted.delta && !w.known_closed())) {
    grads = weight_gradients(side, rows ? call("aten::index_select", "", dy2, int64_t{0}, *rows) : dy2, *x2, scratch);
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
