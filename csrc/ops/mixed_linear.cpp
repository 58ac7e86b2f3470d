// y = x W_t^T + b for rows of many tasks, and its gradients. Rows of the base and of closed tasks are one
// product with W. Those of an open task are one with its W_t: few rows of many tasks by one pass over W, more of them
// task by task; or, where choose_mixing() says so, a part of the base's product, to which the one with Delta is added.
#include "core/device.h"
#include "core/linear.h"
#include "core/mixed.h"
#include "core/mixed_device.h"
#include "cpu/isa.h"
#include "ops.h"

namespace taps {
namespace {

using Use = Part::Use;

// Whether these rows are multiplied with W first, Delta's product added.
bool apart(const GatedWeight& w, Dtype compute, int64_t rows, bool fused) {
  MixedProblem problem;
  problem.addable = !w.weight.place.cuda && size_of(compute) > 2 && w.weight.dtype == compute &&
                    w.delta->dtype == compute && !w.gate.on_device();
  problem.fused = fused;
  problem.rows = rows;
  problem.outputs = w.weight.sizes[0];
  problem.inputs = w.weight.sizes[1];
  return chosen_mixing(problem) == Mixing::kApart;
}

// y += x other^T.
void add_product(const Tensor& x, const Tensor& other, const Tensor& y) {
  call("aten::linear", "out", x, other, OptionalTensor(y), y);
}

bool fuses(const GatedWeight& w, const Described& x, int64_t rows, bool training) {
  std::optional<Described> matrix;
  if (asks_for_matrix(w, x.dtype, rows, training)) matrix = x;
  return forward_path(w, x.dtype, rows, training, matrix) == Path::kFused;
}

// Few rows of several tasks, by one pass over W.
void together(const TaskWeights& weights, const std::vector<const Group*>& groups, int64_t per, const Tensor& x,
              const OptionalTensor& bias, const Tensor& y) {
  std::vector<Part> xs, ys;
  std::vector<LinearProduct> products;
  for (const Group* group : groups) {
    xs.emplace_back(x, group->at, per, Use::kRead);
    ys.emplace_back(y, group->at, per, Use::kWrite);
    const Described rows = describe(xs.back().tensor(), "input");
    const LinearSizes sizes{rows.sizes[0], rows.sizes[1], y.size(1)};
    void* const result = ys.back().tensor().data_ptr();
    products.push_back(forward_product(weights.of(group->task), rows, data_of(bias), sizes, result));
  }
  const Lease memory(false, 0, static_cast<size_t>(cpu::linear_together_bytes(products.data(), products.size())));
  cpu::linear_together(products.data(), products.size(), memory.data());
  for (const Part& part : ys) part.put();
}

// What is asked for of one task's Delta and score.
void add_weight_side(const TaskWeights& weights, const MixedWanted& wanted, const Group& group, const Tensor& dy,
                     const Tensor& x, Dtype compute, Scratch& scratch, TaskGrads& grads) {
  const GatedWeight& w = weights.of(group.task);
  const auto task = static_cast<size_t>(group.task);
  const bool closed = w.known_closed();
  if (wanted.deltas[task] && closed) grads.deltas[task] = zeros_like(*w.delta);
  const WeightSide side{w, wanted.deltas[task] && !closed, wanted.scores[task], false, 1.0, compute};
  if (!side.want_delta && !side.want_score) return;
  // <G, Delta> = <x Delta^T, dL/dy>: fewer rows than inputs are fewer elements than G has.
  const bool by_rows = !side.want_delta && w.delta->dtype == compute && compute != Dtype::kFloat16 &&
                       !on_tiles(w.weight.place) && x.size(0) < x.size(1);
  if (by_rows) {
    const Described facts = describe(dy, "grad_output");
    const Tensor moved = activation(facts, facts.sizes[1]);
    call("aten::linear", "out", x, *w.delta->tensor, std::nullopt, moved);
    grads.scores[task] = dot_like(*w.score, describe(moved, "linear(input, delta)"), facts, 1.0);
    if (closed) expect_finite_score(w, describe(*grads.scores[task], "score gradient"));
    return;
  }
  const WeightGrads found = weight_gradients(side, dy, x, scratch);
  if (side.want_delta) grads.deltas[task] = found.delta;
  grads.scores[task] = found.score;
}

Tensor sum_of_rows(const Tensor& matrix) {
  return call("aten::sum", "dim_IntList", matrix, std::optional<Ints>(Ints{0}), false, std::nullopt);
}

// Where tile kernels run: all rows by grouped products, or in the order of their tasks; none where they lie in that
// order already, and the host knows it.
OptionalTensor forward_on_tiles(const TaskWeights& weights, const Described& x, const LinearSizes& sizes, int64_t per,
                                const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                                const std::vector<OptionalTensor>& scores, const Tensor& task_ids,
                                const OptionalTensor& bias, const Ints& gates, double threshold, bool training) {
  const bool unknown = on_device(task_ids);
  if (unknown && (all_closed(weights) || weights.base.weight.numel() == 0)) {
    const Tensor y = gated_linear(*x.tensor, weight, std::nullopt, std::nullopt, bias, std::nullopt, 0.0, std::nullopt,
                                  1.0, training);
    spoil_unknown(y, task_ids, static_cast<int64_t>(weights.tasks.size()));
    return y;
  }
  if (x.numel() == 0 || sizes.outputs == 0)
    return unknown ? OptionalTensor(activation(x, sizes.outputs)) : std::nullopt;
  const Tensor x2 = as_matrix(x, sizes.rows, sizes.inputs);
  if (groups(weights, nullptr, describe(x2, "input"), task_ids)) {
    const OptionalTensor b = dense(checked_bias(bias, weights.base.weight, x.dtype));
    const Tensor y = activation(x, sizes.outputs);
    grouped_forward(weights, x2, task_ids, per, b, y);
    return y;
  }
  const auto order =
      order_of(weights, task_ids, x.place, [&](int64_t task) { return weights.of(task).known_closed(); });
  if (!order) return std::nullopt;
  const Tensor y = mixed_linear(in_order(*x.tensor, order->to), weight, deltas, scores, order->ids, bias, gates,
                                threshold, training);
  return in_order(y, order->back);
}

// The same of the gradients.
std::optional<MixedGrads> backward_on_tiles(const TaskWeights& weights, const MixedWanted& wanted, const Described& dy,
                                            const LinearSizes& sizes, int64_t per, const OptionalTensor& input,
                                            const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                                            const std::vector<OptionalTensor>& scores, const Tensor& task_ids,
                                            const Ints& gates, double threshold) {
  const bool unknown = on_device(task_ids);
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  const bool nothing = dy.numel() == 0 || weights.base.weight.numel() == 0;
  bool of_tasks = false;
  for (int64_t task = 0; task < tasks; ++task) of_tasks = of_tasks || wanted.of(task);
  const bool closed = all_closed(weights);  // dL/dx is the base's
  const Tensor dy2 = as_matrix(dy, sizes.rows, sizes.outputs);
  if (!nothing && (closed ? of_tasks : true) && groups(weights, &wanted, describe(dy2, "grad_output"), task_ids)) {
    Scratch scratch;
    OptionalTensor x2, dinput, dx2, dbias, dweight;
    if (wanted.weight_side()) x2 = input_matrix(input, dy, weights.base.weight, std::nullopt);
    if (wanted.input) {
      dinput = activation(dy, sizes.inputs);
      dx2 = matrix_view(*dinput, sizes.rows, sizes.inputs);
    }
    const TaskGrads grads = grouped_backward(weights, wanted, dy2, x2, task_ids, per, dx2);
    if (wanted.bias) dbias = sum_of_rows(dy2);
    if (wanted.weight) {
      dweight = weight_gradients({weights.base, false, false, true, 1.0, dy.dtype}, dy2, *x2, scratch).weight;
    }
    return pack_mixed(weights, wanted, dy.dtype, dinput, dbias, dweight, grads);
  }
  if (unknown) {  // the base's alone
    const Grads found =
        gated_linear_backward(*dy.tensor, input, weight, std::nullopt, std::nullopt, std::nullopt, 0.0,
                              {wanted.input, false, false, wanted.bias, wanted.weight}, std::nullopt, 1.0);
    if (wanted.input) spoil_unknown(std::get<0>(found), task_ids, tasks);
    const auto if_wanted = [](bool asked, const Tensor& one) { return asked ? OptionalTensor(one) : std::nullopt; };
    return pack_mixed(weights, wanted, dy.dtype, if_wanted(wanted.input, std::get<0>(found)),
                      if_wanted(wanted.bias, std::get<3>(found)), if_wanted(wanted.weight, std::get<4>(found)),
                      TaskGrads(static_cast<size_t>(tasks)));
  }
  const auto order = order_of(weights, task_ids, dy.place,
                              [&](int64_t task) { return weights.of(task).known_closed() && !wanted.of(task); });
  if (!order) return std::nullopt;
  MixedGrads grads = mixed_linear_backward(in_order(*dy.tensor, order->to),
                                           input ? OptionalTensor(in_order(*input, order->to)) : std::nullopt, weight,
                                           deltas, scores, order->ids, gates, threshold,
                                           {wanted.input, wanted.bias, wanted.weight}, wanted.deltas, wanted.scores);
  if (wanted.input) std::get<0>(grads) = in_order(std::get<0>(grads), order->back);
  return grads;
}

}  // namespace

Tensor mixed_linear(const Tensor& input, const Tensor& weight, const std::vector<OptionalTensor>& deltas,
                    const std::vector<OptionalTensor>& scores, const Tensor& task_ids, const OptionalTensor& bias,
                    const Ints& gates, double threshold, bool training) {
  const NoGrad no_grad;
  const TaskWeights weights(weight, deltas, scores, gates, threshold, 2);
  const GatedWeight& base = weights.base;
  const Described x = check_activation(input, "input", base.weight);
  const LinearSizes sizes = check_linear(x, "input", base.weight, base.weight.sizes[1]);
  check_ids(task_ids, x.place);
  const int64_t per = per_sample(sizes.rows, task_ids.numel(), "input");
  if (on_tiles(x.place)) {
    const OptionalTensor y =
        forward_on_tiles(weights, x, sizes, per, weight, deltas, scores, task_ids, bias, gates, threshold, training);
    if (y) return *y;
  }
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  const std::vector<Group> groups =
      grouped(read_ids(task_ids, tasks), tasks, [&](int64_t task) { return weights.of(task).known_closed(); });
  if (groups.size() == 1) {  // the layer of one task, or of the base
    const int64_t task = groups[0].task;
    if (task < 0) {
      return gated_linear(input, weight, std::nullopt, std::nullopt, bias, std::nullopt, 0.0, std::nullopt, 1.0,
                          training);
    }
    const auto at = static_cast<size_t>(task);
    const bool read = weights.of(task).gate.on_device();
    return gated_linear(input, weight, weights.deltas[at], weights.scores[at], bias,
                        read ? std::nullopt : std::optional<bool>(true), threshold, std::nullopt, 1.0, training);
  }
  const OptionalTensor checked = checked_bias(bias, base.weight, x.dtype);
  const OptionalTensor b = dense(checked);
  const Tensor y = activation(x, sizes.outputs);
  if (groups.empty() || sizes.outputs == 0) return y;
  const Tensor y2 = matrix_view(y, sizes.rows, sizes.outputs);
  const Tensor x2 = in_samples(as_matrix(x, sizes.rows, sizes.inputs), groups);
  const Described matrix = describe(x2, "input");

  std::vector<const Group*> with_base, added, few, alone;
  for (const Group& group : groups) {
    const GatedWeight& w = weights.of(group.task);
    const int64_t rows = static_cast<int64_t>(group.at.size()) * per;
    if (group.task < 0) {
      with_base.push_back(&group);
      continue;
    }
    const bool fused = fuses(w, matrix, rows, training);
    if (apart(w, x.dtype, rows, fused)) {
      with_base.push_back(&group);
      added.push_back(&group);
    } else {
      (fused && rows <= cpu::kFewRows && !on_tiles(x.place) ? few : alone).push_back(&group);
    }
  }

  Scratch scratch;
  OptionalTensor spare_x, spare_y;
  if (!with_base.empty()) {
    const std::vector<int64_t> at = united(with_base);
    const Part from(x2, at, per, Use::kRead, &spare_x), to(y2, at, per, Use::kWrite, &spare_y);
    linear_into(base, from.tensor(), b, training, to.tensor(), scratch);
    to.put();
  }
  if (!few.empty()) together(weights, few, per, x2, b, y2);
  for (const Group* group : alone) {
    const Part from(x2, group->at, per, Use::kRead, &spare_x), to(y2, group->at, per, Use::kWrite, &spare_y);
    linear_into(weights.of(group->task), from.tensor(), b, training, to.tensor(), scratch);
    to.put();
  }
  for (const Group* group : added) {
    const Part from(x2, group->at, per, Use::kRead, &spare_x), to(y2, group->at, per, Use::kUpdate, &spare_y);
    add_product(from.tensor(), *weights.of(group->task).delta->tensor, to.tensor());
    to.put();
  }
  return y;
}

MixedGrads mixed_linear_backward(const Tensor& grad_output, const OptionalTensor& input, const Tensor& weight,
                                 const std::vector<OptionalTensor>& deltas, const std::vector<OptionalTensor>& scores,
                                 const Tensor& task_ids, const Ints& gates, double threshold,
                                 const std::vector<bool>& input_bias_weight, const std::vector<bool>& delta_mask,
                                 const std::vector<bool>& score_mask) {
  const NoGrad no_grad;
  const TaskWeights weights(weight, deltas, scores, gates, threshold, 2);
  const GatedWeight& base = weights.base;
  const MixedWanted wanted = check_mixed_masks(input_bias_weight, delta_mask, score_mask, weights);
  const Described dy = check_activation(grad_output, "grad_output", base.weight);
  const LinearSizes sizes = check_linear(dy, "grad_output", base.weight, base.weight.sizes[0]);
  check_ids(task_ids, dy.place);
  const int64_t per = per_sample(sizes.rows, task_ids.numel(), "grad_output");
  if (on_tiles(dy.place)) {
    std::optional<MixedGrads> grads =
        backward_on_tiles(weights, wanted, dy, sizes, per, input, weight, deltas, scores, task_ids, gates, threshold);
    if (grads) return std::move(*grads);
  }
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  const std::vector<Group> groups = grouped(read_ids(task_ids, tasks), tasks, [](int64_t) { return false; });
  const Dtype compute = dy.dtype;
  const Tensor dy2 = in_samples(as_matrix(dy, sizes.rows, sizes.outputs), groups);
  OptionalTensor x2;
  if (wanted.weight_side()) x2 = in_samples(input_matrix(input, dy, base.weight, std::nullopt), groups);
  OptionalTensor dinput, dx2, dbias, dweight;
  if (wanted.input) {
    dinput = activation(dy, sizes.inputs);
    dx2 = matrix_view(*dinput, sizes.rows, sizes.inputs);
  }
  if (wanted.bias) {
    dbias = sum_of_rows(dy2);
  }

  Scratch scratch;
  OptionalTensor spare_dy, spare_dx, spare_x;
  std::vector<const Group*> with_base;
  std::vector<bool> added(static_cast<size_t>(tasks), false);
  for (const Group& group : groups) {
    const GatedWeight& w = weights.of(group.task);
    const bool open = group.task >= 0 && !w.known_closed();
    const bool adds = open && apart(w, compute, static_cast<int64_t>(group.at.size()) * per, false);
    if (adds) added[static_cast<size_t>(group.task)] = true;
    if (!open || adds) with_base.push_back(&group);
  }
  if (wanted.input && !with_base.empty() && sizes.inputs > 0) {
    const std::vector<int64_t> at = united(with_base);
    const Part from(dy2, at, per, Use::kRead, &spare_dy), to(*dx2, at, per, Use::kWrite, &spare_dx);
    input_gradient_into(base, from.tensor(), to.tensor(), scratch);
    to.put();
  }
  TaskGrads grads(static_cast<size_t>(tasks));
  for (const Group& group : groups) {
    if (group.task < 0) continue;
    const GatedWeight& w = weights.of(group.task);
    const bool adds = added[static_cast<size_t>(group.task)];
    const bool moves = wanted.input && !w.known_closed() && sizes.inputs > 0;
    if (!moves && !wanted.of(group.task)) continue;
    const Part from(dy2, group.at, per, Use::kRead, &spare_dy);
    if (moves) {
      const Part to(*dx2, group.at, per, adds ? Use::kUpdate : Use::kWrite, &spare_dx);
      if (adds) {
        add_product(from.tensor(), transposed(*w.delta->tensor), to.tensor());
      } else {
        input_gradient_into(w, from.tensor(), to.tensor(), scratch);
      }
      to.put();
    }
    if (wanted.of(group.task)) {
      const Part x(*x2, group.at, per, Use::kRead, &spare_x);
      add_weight_side(weights, wanted, group, from.tensor(), x.tensor(), compute, scratch, grads);
    }
  }
  if (wanted.weight) {
    dweight = weight_gradients({base, false, false, true, 1.0, compute}, dy2, *x2, scratch).weight;
  }
  return pack_mixed(weights, wanted, compute, dinput, dbias, dweight, grads);
}

}  // namespace taps
