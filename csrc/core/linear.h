// The three products of a linear layer with W_t on matrices, the same on every device: choose() picks, and torch's own
// products (cuBLAS, oneDNN, MKL) run on W or on W_t in the workspace, or kernels that make W_t on its way.
#pragma once

#include "core/gradient.h"
#include "core/weight.h"

namespace taps {

// M rows; the layer is [N, K].
struct LinearSizes {
  int64_t rows = 1;
  int64_t inputs = 0;
  int64_t outputs = 0;
};

// x [..., K] with W [N, K]; `name` is the activation that is checked, `width` its last size.
LinearSizes check_linear(const Described& activation, const char* name, const Described& weight, int64_t width);

// [..., C] as [rows, C]: a view where the leading dimensions lie evenly, else a copy.
Tensor as_matrix(const Described& activation, int64_t rows, int64_t columns);

// The input of the forward as a matrix [M, K], or the rows of it that were picked.
Tensor input_matrix(const OptionalTensor& input, const Described& dy, const Described& weight,
                    const OptionalTensor& rows);

Tensor transposed(const Tensor& matrix);

// The shape of an activation with `columns` last; a new one of it.
Ints activation_shape(const Described& like, int64_t columns);
Tensor activation(const Described& like, int64_t columns);
Tensor matrix_view(const Tensor& activation, int64_t rows, int64_t columns);  // of one that is contiguous

// --- the forward ---------------------------------------------------------------------------------

// Whether the input's layout decides on its path: only then may it be worth a copy to have it as a matrix.
bool asks_for_matrix(const GatedWeight& w, Dtype compute, int64_t rows, bool training);

// `matrix`: the input as one, where that was asked for.
Path forward_path(const GatedWeight& w, Dtype compute, int64_t rows, bool training,
                  const std::optional<Described>& matrix);

// The fused product's operands; its bias is dense or none.
LinearProduct forward_product(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes,
                              void* y);

// x [M, K] to y [M, N] by the fused kernels.
void fused_forward(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes, void* y);

// A packed Delta in the place of Delta, for few rows on the CPU.
void packed_forward(const GatedWeight& w, const PackedDelta& delta, const Described& x, const void* bias,
                    const LinearSizes& sizes, void* y);

// Whether kernels of our own may read this activation.
bool fusable_activation(const Described& matrix);

// x W_t^T + bias into y, by the path that is chosen.
void linear_into(const GatedWeight& w, const Tensor& x, const OptionalTensor& bias, bool training, const Tensor& y,
                 Scratch& scratch);

// --- the gradients -------------------------------------------------------------------------------

// dy W_t into dx.
void input_gradient_into(const GatedWeight& w, const Tensor& dy, const Tensor& dx, Scratch& scratch);

// What `side` wants of G = dy^T x.
WeightGrads weight_gradients(const WeightSide& side, const Tensor& dy, const Tensor& x, Scratch& scratch);

}  // namespace taps
