// The ops, as C++ functions over stable tensors. Schemas and meaning: ops.cpp.
#pragma once

#include "rebuild.h"

namespace taps {

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // input, delta, score, bias, weight

void reconstruct(const Tensor& out, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                 std::optional<bool> gate, double threshold);

void foreach_reconstruct(const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
                         const std::vector<OptionalTensor>& deltas, const std::vector<OptionalTensor>& scores,
                         const Ints& gates, double threshold);

Tensor gated_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                    const OptionalTensor& bias, std::optional<bool> gate, double threshold,
                    const OptionalTensor& rows = std::nullopt, double row_scale = 1.0, bool training = false);

Grads gated_linear_backward(const Tensor& grad_output, const OptionalTensor& input, const Tensor& weight,
                            const OptionalTensor& delta, const OptionalTensor& score, std::optional<bool> gate,
                            double threshold, const std::vector<bool>& output_mask, const OptionalTensor& rows,
                            double row_scale);

Tensor gated_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                    const OptionalTensor& bias, const Ints& stride, const Ints& padding, const Ints& dilation,
                    int64_t groups, std::optional<bool> gate, double threshold,
                    const OptionalTensor& rows = std::nullopt, double row_scale = 1.0, bool training = false);

Grads gated_conv2d_backward(const Tensor& grad_output, const OptionalTensor& input, const Ints& input_size,
                            const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                            std::optional<bool> gate, double threshold, const Ints& stride, const Ints& padding,
                            const Ints& dilation, int64_t groups, const std::vector<bool>& output_mask,
                            const OptionalTensor& rows, double row_scale);

// --- shared by linear.cpp and conv2d.cpp ---------------------------------------------------------

Tensor cast_to(const Described& from, Dtype dtype);  // small tensors: a bias
OptionalTensor checked_bias(const OptionalTensor& bias, const Described& weight, Dtype compute);

// The five results; one that was not asked for is an empty tensor of shape [0].
Grads pack_grads(const GatedWeight& w, Dtype compute, const OptionalTensor& dinput, const WeightGrads& grads,
                 const OptionalTensor& dbias);

}  // namespace taps
