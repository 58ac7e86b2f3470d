// The products of gated layers that kernels fuse with W_t, as the ops call them: no workspace for W_t, and for the
// weight gradient no G. On CUDA the three of a linear layer in 16 bits; on the CPU the forward of linear layers and
// convolutions, in fp32 and bf16, unless gradients are asked for: training is to the bit what it is on whole weights.
#pragma once

#include "rebuild.h"

namespace taps {

// M rows; the layer is [N, K].
struct LinearSizes {
  int64_t rows = 1;
  int64_t inputs = 0;
  int64_t outputs = 0;
};

// [h, w] each.
struct Geometry {
  Ints stride, padding, dilation;
  int64_t groups;

  int64_t output_size(int64_t input, int64_t kernel, size_t axis) const {
    const int64_t span = input + 2 * padding[axis] - dilation[axis] * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride[axis] + 1;
  }
};

// Whether the kernels know these types and layouts. `weight` need not be fusable for the weight gradient, which does
// not read it.
bool fusable(Product product, const GatedWeight& w, Dtype compute, bool training);
bool fusable_gradient(const GatedWeight& w, Dtype compute);
bool fusable_activation(const Described& matrix);
bool fusable_convolution(const GatedWeight& w, const Described& x, const Geometry& geometry, bool training);

// The same two on the CPU into memory that is there, with a dense bias or none.
struct Images {
  Ints sizes, strides;  // [B, O, H, W]
};
Images convolved(const Described& weight, const Described& x, const Geometry& geometry);
void fused_forward_into(const GatedWeight& w, const Described& x, const void* bias, const LinearSizes& sizes, void* y);
void fused_convolution_into(const GatedWeight& w, const Described& x, const void* bias, const Geometry& geometry,
                            const Images& result, void* y);

// x [M, K] to y [M, N]; dy [M, N] to dx [M, K].
void fused_forward(const GatedWeight& w, const Described& x, const OptionalTensor& bias, const LinearSizes& sizes,
                   void* y);
Tensor fused_convolution(const GatedWeight& w, const Described& x, const OptionalTensor& bias,
                         const Geometry& geometry);
void fused_input_gradient(const GatedWeight& w, const Described& dy, const LinearSizes& sizes, void* dx);

// g * scale * G and scale * <G, Delta>, each where `side` wants it. The weight's own gradient is not among them.
WeightGrads fused_weight_gradient(const WeightSide& side, const Described& dy, const Described& x,
                                  const LinearSizes& sizes);

}  // namespace taps
