// A mixed batch where tile kernels run (csrc/cuda/mixed.cuh). Ids may be on the device, where nobody reads them: then
// one grouped launch multiplies all tasks. Of ids on the host that is one of two ways; the other puts the samples in
// the order of their tasks and leaves each task to the operators of one layer.
#pragma once

#include <functional>

#include "core/linear.h"
#include "core/mixed.h"

namespace taps {

// Whether the host cannot read them.
bool on_device(const Tensor& task_ids);

// Raises, saying what they would have to be, for what only ids on the host can do.
[[noreturn]] void fail_on_device_ids(const char* what);

// Whether no task among these is open, as far as the host knows.
bool all_closed(const TaskWeights& weights);

// Samples of `result` whose ids are of no task become NaN. Each sample lies without gaps, behind the one before.
void spoil_unknown(const Tensor& result, const Tensor& task_ids, int64_t tasks);

// The order that puts samples of the host's ids behind each other that are one product: first those that `joins` the
// base's, then the tasks that are closed, then the open ones. None where they lie like that already.
struct Order {
  Tensor to, back;  // indices, on the device
  Tensor ids;       // as sorted, on the host
};
std::optional<Order> order_of(const TaskWeights& weights, const Tensor& task_ids, Place place,
                              const std::function<bool(int64_t)>& joins);

// Samples by such an index, each laid out as it is.
Tensor in_order(const Tensor& whole, const Tensor& index);

// Numbers of the host where the activations are, from memory that nobody waits for.
Tensor to_place(const Tensor& numbers, Place place);
Tensor on_host(const std::vector<int64_t>& values);

// --- grouped -------------------------------------------------------------------------------------

// Whether the products of these rows are grouped: that of device ids must be, and raises where it cannot be.
bool groups(const TaskWeights& weights, const MixedWanted* wanted, const Described& activation, const Tensor& task_ids);

// x [M, K] to y [M, N].
void grouped_forward(const TaskWeights& weights, const Tensor& x, const Tensor& task_ids, int64_t per,
                     const OptionalTensor& bias, const Tensor& y);

// What is wanted on each task's side, and dx where it is there. `x` is there where a weight's side is wanted.
TaskGrads grouped_backward(const TaskWeights& weights, const MixedWanted& wanted, const Tensor& dy,
                           const OptionalTensor& x, const Tensor& task_ids, int64_t per, const OptionalTensor& dx);

}  // namespace taps
