// The operators, as C++ functions over stable tensors, and what Python calls in place of two of them. Schemas and
// meaning: ops.cpp. Each has a file of its own in csrc/ops.
#pragma once

#include "core/gradient.h"
#include "core/layer.h"
#include "core/mixed.h"

namespace taps {

void reconstruct(const Tensor& out, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                 std::optional<bool> gate, double threshold);

void foreach_reconstruct(const std::vector<Tensor>& outs, const std::vector<Tensor>& weights,
                         const std::vector<OptionalTensor>& deltas, const std::vector<OptionalTensor>& scores,
                         const Ints& gates, double threshold);

void foreach_settle(const std::vector<Tensor>& delta_gradients, const std::vector<Tensor>& score_gradients,
                    const std::vector<Tensor>& gradients, const std::vector<Tensor>& deltas,
                    const std::vector<OptionalTensor>& scores, const Ints& gates, double threshold);

void unpack(const Tensor& out, const Tensor& weight, const Tensor& codes, const Tensor& values,
            const std::string& codec, const OptionalTensor& score, std::optional<bool> gate, double threshold);

void encode(const Tensor& delta, const Tensor& codes, const Tensor& values, const std::string& codec);

Tensor gated_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                    const OptionalTensor& bias, std::optional<bool> gate, double threshold, const OptionalTensor& rows,
                    double row_scale, bool training);

Tensor packed_linear(const Tensor& input, const Tensor& weight, const Tensor& codes, const Tensor& values,
                     const std::string& codec, const OptionalTensor& bias);

Grads gated_linear_backward(const Tensor& grad_output, const OptionalTensor& input, const Tensor& weight,
                            const OptionalTensor& delta, const OptionalTensor& score, std::optional<bool> gate,
                            double threshold, const std::vector<bool>& output_mask, const OptionalTensor& rows,
                            double row_scale);

Tensor gated_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                    const OptionalTensor& bias, const Ints& stride, const Ints& padding, const Ints& dilation,
                    int64_t groups, std::optional<bool> gate, double threshold, const OptionalTensor& rows,
                    double row_scale, bool training);

// The same, into `out` where kernels of our own write it and it has their layout; whatever is returned has the result.
Tensor gated_conv2d_into(const OptionalTensor& out, const Tensor& input, const Tensor& weight,
                         const OptionalTensor& delta, const OptionalTensor& score, const OptionalTensor& bias,
                         const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                         std::optional<bool> gate, double threshold, const OptionalTensor& rows, bool training);

Grads gated_conv2d_backward(const Tensor& grad_output, const OptionalTensor& input, const Ints& input_size,
                            const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                            std::optional<bool> gate, double threshold, const Ints& stride, const Ints& padding,
                            const Ints& dilation, int64_t groups, const std::vector<bool>& output_mask,
                            const OptionalTensor& rows, double row_scale);

// Mixed batches.
Tensor mixed_linear(const Tensor& input, const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                    const std::vector<OptionalTensor>& scores, const Tensor& task_ids, const OptionalTensor& bias,
                    const Ints& gates, double threshold, bool training);

MixedGrads mixed_linear_backward(const Tensor& grad_output, const OptionalTensor& input, const Tensor& weight,
                                 const std::vector<OptionalTensor>& deltas, const std::vector<OptionalTensor>& scores,
                                 const Tensor& task_ids, const Ints& gates, double threshold,
                                 const std::vector<bool>& input_bias_weight, const std::vector<bool>& delta_mask,
                                 const std::vector<bool>& score_mask);

Tensor mixed_conv2d(const Tensor& input, const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                    const std::vector<OptionalTensor>& scores, const Tensor& task_ids, const OptionalTensor& bias,
                    const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups, const Ints& gates,
                    double threshold, bool training);

MixedGrads mixed_conv2d_backward(const Tensor& grad_output, const OptionalTensor& input, const Ints& input_size,
                                 const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                                 const std::vector<OptionalTensor>& scores, const Tensor& task_ids, const Ints& stride,
                                 const Ints& padding, const Ints& dilation, int64_t groups, const Ints& gates,
                                 double threshold, const std::vector<bool>& input_bias_weight,
                                 const std::vector<bool>& delta_mask, const std::vector<bool>& score_mask);

Tensor mixed_lowrank(const Tensor& input, const std::vector<OptionalTensor>& a, const std::vector<OptionalTensor>& b,
                     const Tensor& task_ids, const std::vector<double>& scales);

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> mixed_lowrank_backward(
    const Tensor& grad_output, const Tensor& input, const std::vector<OptionalTensor>& a,
    const std::vector<OptionalTensor>& b, const Tensor& task_ids, const std::vector<double>& scales, bool input_mask,
    const std::vector<bool>& a_mask, const std::vector<bool>& b_mask);

// Patches: bytes of tensors on the CPU, with what cpu/patch.h says of them as a list of numbers.
std::vector<int64_t> patch_sum(const Tensor& bytes, int64_t first_word);
std::vector<int64_t> patch_measure(const Tensor& before, const Tensor& after, int64_t unit);
std::vector<int64_t> patch_encode(const Tensor& before, const Tensor& after, const Tensor& index, const Tensor& values,
                                  int64_t unit, int64_t width);
std::vector<int64_t> patch_check(const OptionalTensor& target, const Tensor& index, const Tensor& values, int64_t unit,
                                 int64_t units, int64_t width);
std::vector<int64_t> patch_prove(const Tensor& index, int64_t count, int64_t units, int64_t width);
std::vector<int64_t> patch_write(const Tensor& target, const Tensor& index, const Tensor& values, int64_t unit,
                                 int64_t width);
void patch_swap(const Tensor& target, const Tensor& index, const Tensor& values, const Tensor& old,
                const Tensor& swapped, int64_t unit, int64_t width);

// What eager calls of Python use instead, or None (core/layer.h).
pybind11::object direct_linear(const Layer& layer, const Call& call);
pybind11::object direct_conv2d(const Layer& layer, pybind11::handle stride, pybind11::handle padding,
                               pybind11::handle dilation, pybind11::handle groups, const Call& call);

}  // namespace taps
