#include "fused.h"

#include "cpu/isa.h"
#include "device.h"

namespace taps {
namespace {

// Whether tile kernels run there: on a GPU, and in the twin's build everywhere. The CPU's own kernel is cpu/linear.cpp.
bool on_tiles(Place place) { return place.cuda || cuda::kTilesOnCpu; }

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

Tensor contiguous(const Described& vector) {
  if (vector.numel() <= 1 || vector.strides[0] == 1) return *vector.tensor;
  const Tensor copy = empty_strided(vector.sizes, contiguous_strides(vector.sizes), vector.dtype, vector.place);
  reconstruct_into(describe(copy, "bias"), &vector, nullptr, Gate{});
  return copy;
}

LinearProduct product_of(const GatedWeight& w, Dtype compute, const LinearSizes& sizes) {
  LinearProduct args;
  args.rows = sizes.rows;
  args.outputs = sizes.outputs;
  args.inputs = sizes.inputs;
  args.compute = compute;
  args.weight = matrix_of(w.weight);
  args.weight_dtype = w.weight.dtype;
  args.delta_dtype = w.known_closed() ? w.weight.dtype : w.delta->dtype;
  if (!w.known_closed()) args.delta = matrix_of(*w.delta);
  args.gate = w.gate;
  return args;
}

Tensor activation(int64_t rows, int64_t columns, Dtype dtype, Place place) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  return empty_strided(Span(sizes, 2), Span(strides, 2), dtype, place);
}

void run(Product product, LinearProduct& args, Place place) {
  if (!on_tiles(place)) {
    const Tensor memory = activation(1, cpu::linear_bytes(args) / 4, Dtype::kFloat32, place);
    args.memory = memory.data_ptr();
    return cpu::linear(args);
  }
  void* const stream = stream_of(place);
  const auto bytes = static_cast<size_t>(cuda::linear_bytes(product, args, place.index));
  const Lease memory(place.cuda, place.index, stream, bytes);
  args.memory = memory.data();
  cuda::linear(product, args, place.index, stream);
}

}  // namespace

bool fusable_activation(const Described& matrix) { return matrix.numel() > 0 && readable(matrix); }

bool fusable(Product product, const GatedWeight& w, Dtype compute, bool training) {
  if (w.weight.numel() == 0 || !readable(w.weight)) return false;
  if (!on_tiles(w.weight.place)) {
    const Dtype delta = w.known_closed() ? w.weight.dtype : w.delta->dtype;
    return product == Product::kForward && !training && cpu_fuses(w.weight.dtype, delta, compute) &&
           (w.known_closed() || readable(*w.delta));
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

Tensor fused_forward(const GatedWeight& w, const Described& x, const OptionalTensor& bias, const LinearSizes& sizes) {
  LinearProduct args = product_of(w, x.dtype, sizes);
  const Tensor y = activation(sizes.rows, sizes.outputs, x.dtype, x.place);
  args.x = matrix_of(x);
  OptionalTensor dense;
  if (bias) {
    dense = contiguous(describe(*bias, "bias"));
    args.bias = dense->data_ptr();
  }
  args.result = y.data_ptr();
  args.ld_result = sizes.outputs;
  run(Product::kForward, args, x.place);
  return y;
}

Tensor fused_input_gradient(const GatedWeight& w, const Described& dy, const LinearSizes& sizes) {
  LinearProduct args = product_of(w, dy.dtype, sizes);
  const Tensor dx = activation(sizes.rows, sizes.inputs, dy.dtype, dy.place);
  args.dy = matrix_of(dy);
  args.result = dx.data_ptr();
  args.ld_result = sizes.inputs;
  run(Product::kInputGradient, args, dy.place);
  return dx;
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
