// The products of a gated linear layer that kernels fuse with W_t, as the ops call them: no workspace for W_t, and for
// the weight gradient no G. On CUDA all three in 16 bits; on the CPU the forward, in fp32 and bf16, unless
// gradients are asked for: training is to the bit what it is on whole weights.
#pragma once

#include "rebuild.h"

namespace taps {

// M rows; the layer is [N, K].
struct LinearSizes {
  int64_t rows = 1;
  int64_t inputs = 0;
  int64_t outputs = 0;
};

// Whether the kernels know these types and layouts. `weight` need not be fusable for the weight gradient, which does
// not read it.
bool fusable(Product product, const GatedWeight& w, Dtype compute, bool training);
bool fusable_gradient(const GatedWeight& w, Dtype compute);
bool fusable_activation(const Described& matrix);

// x [M, K] to y [M, N]; dy [M, N] to dx [M, K].
Tensor fused_forward(const GatedWeight& w, const Described& x, const OptionalTensor& bias, const LinearSizes& sizes);
Tensor fused_input_gradient(const GatedWeight& w, const Described& dy, const LinearSizes& sizes);

// g * scale * G and scale * <G, Delta>, each where `side` wants it. The weight's own gradient is not among them.
WeightGrads fused_weight_gradient(const WeightSide& side, const Described& dy, const Described& x,
                                  const LinearSizes& sizes);

}  // namespace taps
