// y = x W_t^T + b and its backward, the same on every device: W_t comes from rebuild.h and the
// products from torch (cuBLAS, oneDNN, MKL) through its dispatcher, or both at once from fused.h.
#include "fused.h"
#include "ops.h"

namespace taps {
namespace {

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

// A new activation like another one, with `columns` last.
Tensor activation(const Described& like, int64_t columns) {
  Ints shape(like.sizes.begin(), like.sizes.end());
  shape.back() = columns;
  const Span sizes(shape.data(), shape.size());
  return empty_strided(sizes, contiguous_strides(sizes), like.dtype, like.place);
}

// The input of the forward as a matrix [M, K], or the rows of it that were picked.
Tensor input_matrix(const OptionalTensor& input, const Described& dy, const Described& weight,
                    const OptionalTensor& rows) {
  if (!input) fail("input: expected a tensor, weight gradients are asked for; got None");
  const Described x = check_activation(*input, "input", weight);
  const LinearSizes sizes = check_linear(x, "input", weight, weight.sizes[1]);
  Ints expected(dy.sizes.begin(), dy.sizes.end());
  expected.back() = sizes.inputs;
  if (rows) expected = {rows->numel(), sizes.inputs};
  expect_shape(x, "input", expected);
  if (x.dtype != dy.dtype) {
    fail("input: expected dtype ", to_string(dy.dtype), " like grad_output, got ", to_string(x.dtype));
  }
  return as_matrix(x, sizes.rows, sizes.inputs);
}

}  // namespace

Tensor cast_to(const Described& from, Dtype dtype) {
  if (from.dtype == dtype) return *from.tensor;
  Tensor result = empty_strided(from.sizes, contiguous_strides(from.sizes), dtype, from.place);
  Gate none;
  reconstruct_into(describe(result, "cast"), &from, nullptr, none);
  return result;
}

OptionalTensor checked_bias(const OptionalTensor& bias, const Described& weight, Dtype compute) {
  if (!bias) return std::nullopt;
  const Described described = describe(*bias, "bias");
  check_bias(described, weight);
  return cast_to(described, compute);
}

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
  // As a matrix x might be copied: not for rows that are not fused anyway.
  if (may_fuse(w, x.dtype, sizes.rows) && fusable(Product::kForward, w, x.dtype, training)) {
    x2 = as_matrix(x, sizes.rows, sizes.inputs);
  }
  const bool fits = x2 && fusable_activation(describe(*x2, "input"));
  const Path path = path_for(w, x.dtype, sizes.rows, fits);
  if (path == Path::kFused) {
    const Tensor y = activation(x, sizes.outputs);
    fused_forward(w, describe(*x2, "input"), b, sizes, y.data_ptr());
    return y;
  }
  Scratch scratch;
  const Tensor matrix = layer_weight(w, x.dtype, path, scratch);
  const Tensor y = call("aten::linear", "", input, matrix, b);
  return x.ndim() == 2 ? y : owned(y);  // of other shapes it is a view of its matrix
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
  const WeightSide side{w, wanted.delta, wanted.score, wanted.weight, row_scale, compute};
  OptionalTensor x2;
  if (wanted.weight_side()) x2 = input_matrix(input, dy, w.weight, rows);
  const int64_t taken = x2 ? x2->size(0) : 0;  // rows that the weight side is estimated from

  const Tensor dy2 = as_matrix(dy, sizes.rows, sizes.outputs);
  const Described dy_matrix = describe(dy2, "grad_output");
  const bool dy_fits = fusable(Product::kInputGradient, w, compute, true) && fusable_activation(dy_matrix);
  const Path path = wanted.input ? path_for(w, compute, sizes.rows, dy_fits) : Path::kStock;
  // Known to be closed: no product is needed for a delta's zero gradient.
  const bool form_gradient = wanted.score || wanted.weight || (wanted.delta && !w.known_closed());
  const bool fits = form_gradient && !wanted.weight && fusable_gradient(w, compute) &&
                    fusable_activation(describe(*x2, "input")) &&
                    (rows ? sizes.outputs * size_of(compute) % 4 == 0 : fusable_activation(dy_matrix));
  const bool fused = form_gradient && gradient_path_for(w, compute, taken, fits) == Path::kFused;
  const Holder holder = holder_for(side);
  Scratch scratch;

  OptionalTensor dinput;
  if (wanted.input) {
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
  if (form_gradient) {
    OptionalTensor picked;
    if (rows) picked = call("aten::index_select", "", dy2, int64_t{0}, *rows);
    const Tensor dy_taken = picked ? *picked : dy2;
    if (fused) {
      const LinearSizes of_taken{taken, sizes.inputs, sizes.outputs};
      grads = fused_weight_gradient(side, describe(dy_taken, "grad_output"), describe(*x2, "input"), of_taken);
    } else {
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

Grads pack_grads(const GatedWeight& w, Dtype compute, const OptionalTensor& dinput, const WeightGrads& grads,
                 const OptionalTensor& dbias) {
  const Place place = w.weight.place;
  const auto or_nothing = [&](const OptionalTensor& tensor, Dtype dtype) {
    return tensor ? *tensor : no_tensor(dtype, place);
  };
  return {or_nothing(dinput, compute), or_nothing(grads.delta, w.delta ? w.delta->dtype : w.weight.dtype),
          or_nothing(grads.score, w.score ? w.score->dtype : Dtype::kFloat32), or_nothing(dbias, compute),
          or_nothing(grads.weight, w.weight.dtype)};
}

}  // namespace taps
