// y = conv2d(x, W_t) + b for images of many tasks, and its gradients, on the CPU: a convolution for each open task and
// one for the base with all closed ones, each as that of a layer by itself.
#include <algorithm>

#include "core/mixed.h"
#include "core/weight.h"
#include "ops.h"

namespace taps {
namespace {

using Use = Part::Use;

// What the operators of one layer take of a task.
struct Own {
  OptionalTensor delta, score;
  std::optional<bool> gate;
};

Own own_of(const TaskWeights& weights, int64_t task) {
  if (task < 0) return {std::nullopt, std::nullopt, true};
  const auto at = static_cast<size_t>(task);
  const GatedWeight& w = weights.tasks[at];
  return {weights.deltas[at], weights.scores[at], w.gate.on_device() ? std::nullopt : std::optional<bool>(w.gate.open)};
}

void check_images(const Described& image, const char* name) {
  if (image.ndim() != 4) fail(name, ": expected shape [B, C, H, W], got ", shape_string(image.sizes));
}

// A result for the whole batch, laid out as one group's is.
Tensor like_group(const Tensor& part, int64_t count) {
  const Described one = describe(part, "result");
  Ints sizes(one.sizes.begin(), one.sizes.end()), strides(one.strides.begin(), one.strides.end());
  sizes[0] = count;
  strides[0] = std::max<int64_t>(sizes[1] * sizes[2] * sizes[3], 1);
  return empty_strided(Span(sizes.data(), 4), Span(strides.data(), 4), one.dtype, one.place);
}

// What run(group) gives of each, put together.
template <class Run>
Tensor of_groups(const std::vector<Group>& groups, int64_t per, int64_t count, const Run& run) {
  OptionalTensor whole;
  for (const Group& group : groups) {
    const Tensor part = run(group);
    if (groups.size() == 1) return part;
    if (!whole) whole = like_group(part, count);
    put_samples(part, group.at, per, *whole);
  }
  return *whole;
}

}  // namespace

Tensor mixed_conv2d(const Tensor& input, const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                    const std::vector<OptionalTensor>& scores, const Tensor& task_ids, const OptionalTensor& bias,
                    const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups, const Ints& gates,
                    double threshold, bool training) {
  const NoGrad no_grad;
  const TaskWeights weights(weight, deltas, scores, gates, threshold, 4);
  const Described x = check_activation(input, "input", weights.base.weight);
  check_images(x, "input");
  check_ids(task_ids, x.place);
  const int64_t per = per_sample(x.sizes[0], task_ids.numel(), "input");
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  const std::vector<Group> parts =
      grouped(read_ids(task_ids, tasks), tasks, [&](int64_t task) { return weights.of(task).known_closed(); });
  const auto layer = [&](const Tensor& images, int64_t task) {
    const Own own = own_of(weights, task);
    return gated_conv2d(images, weight, own.delta, own.score, bias, stride, padding, dilation, groups, own.gate,
                        threshold, std::nullopt, 1.0, training);
  };
  if (parts.empty()) return layer(input, -1);
  if (parts.size() == 1) return layer(input, parts[0].task);
  const Tensor images = in_samples(input, parts);
  OptionalTensor spare;
  return of_groups(parts, per, x.sizes[0], [&](const Group& group) {
    return layer(Part(images, group.at, per, Use::kRead, &spare).tensor(), group.task);
  });
}

MixedGrads mixed_conv2d_backward(const Tensor& grad_output, const OptionalTensor& input, const Ints& input_size,
                                 const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                                 const std::vector<OptionalTensor>& scores, const Tensor& task_ids, const Ints& stride,
                                 const Ints& padding, const Ints& dilation, int64_t groups, const Ints& gates,
                                 double threshold, const std::vector<bool>& input_bias_weight,
                                 const std::vector<bool>& delta_mask, const std::vector<bool>& score_mask) {
  const NoGrad no_grad;
  const TaskWeights weights(weight, deltas, scores, gates, threshold, 4);
  const MixedWanted wanted = check_mixed_masks(input_bias_weight, delta_mask, score_mask, weights);
  const Described dy = check_activation(grad_output, "grad_output", weights.base.weight);
  check_images(dy, "grad_output");
  check_ids(task_ids, dy.place);
  const int64_t per = per_sample(dy.sizes[0], task_ids.numel(), "grad_output");
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  std::optional<Described> x;
  if (input) {
    x = check_activation(*input, "input", weights.base.weight);
    check_images(*x, "input");
    if (x->sizes[0] != dy.sizes[0]) {
      fail("input: expected ", dy.sizes[0], " images like grad_output, got ", x->sizes[0]);
    }
  } else if (wanted.weight_side()) {
    fail("input: expected a tensor, weight gradients are asked for; got None");
  }
  const auto layer = [&](const Tensor& dy_part, const OptionalTensor& x_part, int64_t task, bool of_input, bool of_bias,
                         bool of_weight) {
    const Own own = own_of(weights, task);
    const auto at = static_cast<size_t>(task);
    const bool of_delta = task >= 0 && wanted.deltas[at], of_score = task >= 0 && wanted.scores[at];
    return gated_conv2d_backward(dy_part, x_part, input_size, weight, own.delta, own.score, own.gate, threshold, stride,
                                 padding, dilation, groups, {of_input, of_delta, of_score, of_bias, of_weight},
                                 std::nullopt, 1.0);
  };

  // Of a closed task the score alone has rows of its own to be found in.
  const std::vector<Group> parts = grouped(read_ids(task_ids, tasks), tasks, [&](int64_t task) {
    return weights.of(task).known_closed() && !wanted.of(task);
  });
  OptionalTensor dinput, dbias, dweight;
  TaskGrads grads(static_cast<size_t>(tasks));
  const bool whole = wanted.bias || wanted.weight || (wanted.input && parts.empty());
  if (whole) {  // of all images, whatever their tasks
    const Grads all = layer(grad_output, input, -1, wanted.input && parts.empty(), wanted.bias, wanted.weight);
    if (wanted.input && parts.empty()) dinput = std::get<0>(all);
    if (wanted.bias) dbias = std::get<3>(all);
    if (wanted.weight) dweight = std::get<4>(all);
  }
  const Tensor dys = in_samples(grad_output, parts);
  const OptionalTensor xs = input ? OptionalTensor(in_samples(*input, parts)) : std::nullopt;
  OptionalTensor spare_dy, spare_x;
  const auto run = [&](const Group& group) {
    const Part dy_part(dys, group.at, per, Use::kRead, &spare_dy);
    std::optional<Part> x_part;
    if (xs) x_part.emplace(*xs, group.at, per, Use::kRead, &spare_x);
    const Grads found = layer(dy_part.tensor(), x_part ? OptionalTensor(x_part->tensor()) : std::nullopt, group.task,
                              wanted.input, false, false);
    if (group.task >= 0) {
      const auto at = static_cast<size_t>(group.task);
      if (wanted.deltas[at]) grads.deltas[at] = std::get<1>(found);
      if (wanted.scores[at]) grads.scores[at] = std::get<2>(found);
    }
    return std::get<0>(found);
  };
  if (wanted.input && !parts.empty()) {
    dinput = of_groups(parts, per, dy.sizes[0], run);
  } else {
    for (const Group& group : parts) {
      if (wanted.of(group.task)) run(group);
    }
  }
  return pack_mixed(weights, wanted, dy.dtype, dinput, dbias, dweight, grads);
}

}  // namespace taps
