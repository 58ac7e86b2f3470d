// y = conv2d(x, W_t) + b for images of many tasks, and its gradients: a convolution for each open task and one for the
// base with all closed ones, each as that of a layer by itself. Where tile kernels run, one of single pixels may be the
// mixed linear layer of them.
#include <algorithm>

#include "core/mixed.h"
#include "core/mixed_device.h"
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

// What run(group, out) gives of each, put together; it may give `out`, the group's part of the whole, filled.
template <class Run>
Tensor of_groups(const std::vector<Group>& groups, int64_t per, int64_t count, const Run& run) {
  OptionalTensor whole;
  for (const Group& group : groups) {
    OptionalTensor out;
    if (whole && group.adjacent()) out = Part(*whole, group.at, per, Use::kWrite).tensor();
    const Tensor part = run(group, out);
    if (groups.size() == 1) return part;
    if (out && part.data_ptr() == out->data_ptr()) continue;
    if (!whole) whole = like_group(part, count);
    put_samples(part, group.at, per, *whole);
  }
  return *whole;
}

// [N, C, H, W] in pixels without gaps.
bool in_pixels(const Described& image) {
  int64_t step = 1;
  for (const size_t dim : {1, 3, 2, 0}) {
    if (image.sizes[dim] != 1 && image.strides[dim] != step) return false;
    step *= image.sizes[dim];
  }
  return true;
}

Tensor pixels_of(const Tensor& image) {
  const Described facts = describe(image, "image");
  const int64_t channels = facts.sizes[1];
  const int64_t sizes[2] = {facts.sizes[0] * facts.sizes[2] * facts.sizes[3], channels};
  const int64_t strides[2] = {std::max<int64_t>(channels, 1), 1};
  return reshaped(image, Span(sizes, 2), Span(strides, 2));
}

Tensor images_of(const Tensor& pixels, const Described& like) {
  const int64_t channels = pixels.size(1), h = like.sizes[2], w = like.sizes[3];
  const int64_t sizes[4] = {like.sizes[0], channels, h, w};
  const int64_t strides[4] = {h * w * channels, 1, w * channels, channels};
  return owned(reshaped(pixels, Span(sizes, 4), Span(strides, 4)));
}

// A convolution of single pixels as the linear layer of them: its weights as matrices.
struct Pointwise {
  Tensor weight;
  std::vector<OptionalTensor> deltas;
};

Tensor as_matrix(const Tensor& kernel) {
  const int64_t sizes[2] = {kernel.size(0), kernel.size(1)}, strides[2] = {kernel.stride(0), kernel.stride(1)};
  return reshaped(kernel, Span(sizes, 2), Span(strides, 2));
}

Tensor as_kernel(const Tensor& matrix) {
  const int64_t sizes[4] = {matrix.size(0), matrix.size(1), 1, 1};
  const int64_t strides[4] = {matrix.stride(0), matrix.stride(1), 1, 1};
  return owned(reshaped(matrix, Span(sizes, 4), Span(strides, 4)));
}

std::optional<Pointwise> pointwise(const TaskWeights& weights, const Tensor& weight, const Ints& stride,
                                   const Ints& padding, int64_t groups) {
  const Span kernel = weights.base.weight.sizes;
  if (kernel[2] * kernel[3] != 1 || groups != 1 || stride != Ints{1, 1} || padding != Ints{0, 0}) return std::nullopt;
  Pointwise layer{as_matrix(weight), {}};
  for (const OptionalTensor& delta : weights.deltas) {
    layer.deltas.push_back(delta ? OptionalTensor(as_matrix(*delta)) : std::nullopt);
  }
  return layer;
}

constexpr const char* kRebuilt = "a convolution that is not one of single pixels in channels_last";

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
  const auto layer = [&](const Tensor& images, int64_t task, const OptionalTensor& out) {
    const Own own = own_of(weights, task);
    return gated_conv2d_into(out, images, weight, own.delta, own.score, bias, stride, padding, dilation, groups,
                             own.gate, threshold, std::nullopt, training);
  };
  if (on_tiles(x.place)) {
    const bool unknown = on_device(task_ids);
    if (unknown && (all_closed(weights) || x.numel() == 0)) {
      const Tensor y = layer(input, -1, std::nullopt);
      spoil_unknown(y, task_ids, tasks);
      return y;
    }
    const std::optional<Pointwise> one = pointwise(weights, weight, stride, padding, groups);
    if (one && in_pixels(x) && x.numel() > 0) {
      const Tensor rows = pixels_of(input);
      const TaskWeights matrices(one->weight, one->deltas, weights.scores, gates, threshold, 2);
      if (taps::groups(matrices, nullptr, describe(rows, "input"), task_ids)) {
        return images_of(
            mixed_linear(rows, one->weight, one->deltas, weights.scores, task_ids, bias, gates, threshold, training),
            x);
      }
    }
    if (unknown) fail_on_device_ids(kRebuilt);
    const auto order =
        order_of(weights, task_ids, x.place, [&](int64_t task) { return weights.of(task).known_closed(); });
    if (order) {
      const Tensor y = mixed_conv2d(in_order(input, order->to), weight, deltas, scores, order->ids, bias, stride,
                                    padding, dilation, groups, gates, threshold, training);
      return in_order(y, order->back);
    }
  }
  const std::vector<Group> parts =
      grouped(read_ids(task_ids, tasks), tasks, [&](int64_t task) { return weights.of(task).known_closed(); });
  if (parts.empty()) return layer(input, -1, std::nullopt);
  if (parts.size() == 1) return layer(input, parts[0].task, std::nullopt);
  const Tensor images = in_samples(input, parts);
  OptionalTensor spare;
  return of_groups(parts, per, x.sizes[0], [&](const Group& group, const OptionalTensor& out) {
    return layer(Part(images, group.at, per, Use::kRead, &spare).tensor(), group.task, out);
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

  if (on_tiles(dy.place)) {
    const bool unknown = on_device(task_ids);
    bool of_tasks = false;
    for (int64_t task = 0; task < tasks; ++task) of_tasks = of_tasks || wanted.of(task);
    if (unknown && ((all_closed(weights) && !of_tasks) || dy.numel() == 0)) {
      const Grads all = layer(grad_output, input, -1, wanted.input, wanted.bias, wanted.weight);
      if (wanted.input) spoil_unknown(std::get<0>(all), task_ids, tasks);
      const auto if_wanted = [](bool asked, const Tensor& found) {
        return asked ? OptionalTensor(found) : std::nullopt;
      };
      return pack_mixed(weights, wanted, dy.dtype, if_wanted(wanted.input, std::get<0>(all)),
                        if_wanted(wanted.bias, std::get<3>(all)), if_wanted(wanted.weight, std::get<4>(all)),
                        TaskGrads(static_cast<size_t>(tasks)));
    }
    const std::optional<Pointwise> one = pointwise(weights, weight, stride, padding, groups);
    if (one && (!x || in_pixels(*x)) && dy.numel() > 0) {
      constexpr int32_t kChannelsLast = 2;
      const Tensor rows =
          pixels_of(in_pixels(dy) ? grad_output : call("aten::contiguous", "", grad_output, kChannelsLast));
      const TaskWeights matrices(one->weight, one->deltas, weights.scores, gates, threshold, 2);
      if (taps::groups(matrices, &wanted, describe(rows, "grad_output"), task_ids)) {
        MixedGrads grads = mixed_linear_backward(
            rows, input ? OptionalTensor(pixels_of(*input)) : std::nullopt, one->weight, one->deltas, weights.scores,
            task_ids, gates, threshold, {wanted.input, wanted.bias, wanted.weight}, wanted.deltas, wanted.scores);
        if (wanted.input) std::get<0>(grads) = images_of(std::get<0>(grads), dy);
        if (wanted.weight) std::get<2>(grads) = as_kernel(std::get<2>(grads));
        for (int64_t task = 0; task < tasks; ++task) {
          const auto at = static_cast<size_t>(task);
          if (wanted.deltas[at]) std::get<3>(grads)[at] = as_kernel(std::get<3>(grads)[at]);
        }
        return grads;
      }
    }
    if (unknown) fail_on_device_ids(kRebuilt);
    const auto order = order_of(weights, task_ids, dy.place,
                                [&](int64_t task) { return weights.of(task).known_closed() && !wanted.of(task); });
    if (order) {
      MixedGrads grads = mixed_conv2d_backward(
          in_order(grad_output, order->to), input ? OptionalTensor(in_order(*input, order->to)) : std::nullopt,
          input_size, weight, deltas, scores, order->ids, stride, padding, dilation, groups, gates, threshold,
          input_bias_weight, delta_mask, score_mask);
      if (wanted.input) std::get<0>(grads) = in_order(std::get<0>(grads), order->back);
      return grads;
    }
  }

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
  const auto run = [&](const Group& group, const OptionalTensor&) {
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
      if (wanted.of(group.task)) run(group, std::nullopt);
    }
  }
  return pack_mixed(weights, wanted, dy.dtype, dinput, dbias, dweight, grads);
}

}  // namespace taps
