// y = scale_t (x A_t^T) B_t^T for rows of many tasks, and its gradients, on the CPU: two small products for each task,
// from its rows where they lie to its rows of the result.
#include <cstring>

#include "core/device.h"
#include "core/linear.h"
#include "core/mixed.h"
#include "ops.h"

namespace taps {
namespace {

using Use = Part::Use;

struct Factors {
  std::vector<OptionalTensor> a, b;  // what is used of the lists, negated views resolved
  std::vector<int64_t> ranks;        // -1 where a task has none
  int64_t outputs = -1;              // of any task, or -1

  Factors(const std::vector<OptionalTensor>& given_a, const std::vector<OptionalTensor>& given_b,
          const std::vector<double>& scales, const Described& x, int64_t inputs);
};

Factors::Factors(const std::vector<OptionalTensor>& given_a, const std::vector<OptionalTensor>& given_b,
                 const std::vector<double>& scales, const Described& x, int64_t inputs) {
  if (given_b.size() != given_a.size()) {
    fail("b: expected ", given_a.size(), " entries like a, got ", given_b.size());
  }
  if (scales.size() != given_a.size()) {
    fail("scales: expected ", given_a.size(), " entries like a, got ", scales.size());
  }
  for (size_t task = 0; task < given_a.size(); ++task) {
    if (given_a[task].has_value() != given_b[task].has_value()) {
      fail("b[", task, "]: expected a tensor where a has one, and None where it has none");
    }
    a.push_back(std::nullopt);
    b.push_back(std::nullopt);
    ranks.push_back(-1);
    if (!given_a[task]) continue;
    a[task] = call("aten::resolve_neg", "", *given_a[task]);
    b[task] = call("aten::resolve_neg", "", *given_b[task]);
    const Described down = describe(*a[task], "a"), up = describe(*b[task], "b");
    const auto check = [&](const Described& factor, const char* name) {
      if (factor.ndim() != 2) {
        fail(name, "[", task, "]: expected two dimensions, got shape ", shape_string(factor.sizes));
      }
      if (factor.dtype != x.dtype) {
        fail(name, "[", task, "]: expected dtype ", to_string(x.dtype), " like input, got ", to_string(factor.dtype));
      }
      expect_place(factor, name, x, "input");
    };
    check(down, "a");
    check(up, "b");
    if (inputs >= 0 && down.sizes[1] != inputs) {
      fail("a[", task, "]: expected shape [r, ", inputs, "], got ", shape_string(down.sizes));
    }
    if (outputs < 0) outputs = up.sizes[0];
    if (up.sizes[0] != outputs || up.sizes[1] != down.sizes[0]) {
      fail("b[", task, "]: expected shape [", outputs, ", ", down.sizes[0], "], got ", shape_string(up.sizes));
    }
    ranks[task] = down.sizes[0];
  }
  if (outputs < 0) fail("b: expected a tensor for one task at least, got None for all");
}

int64_t rows_in(const Described& activation, const char* name) {
  if (activation.ndim() < 1) fail(name, ": expected shape [..., K], got ", shape_string(activation.sizes));
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < activation.ndim(); ++dim) rows *= activation.sizes[static_cast<size_t>(dim)];
  return rows;
}

Tensor matrix_like(const Tensor& like, int64_t columns) {
  const Described facts = describe(like, "activation");
  const int64_t sizes[2] = {facts.sizes[0], columns};
  const Ints strides = contiguous_strides(Span(sizes, 2));
  return empty_strided(Span(sizes, 2), Span(strides.data(), 2), facts.dtype, facts.place);
}

// x other^T, times the scale.
Tensor scaled_product(const Tensor& x, const Tensor& other, double scale) {
  const Tensor result = matrix_like(x, other.size(0));
  call("aten::linear", "out", x, other, std::nullopt, result);
  Gate open;
  open.open = true;
  const Described facts = describe(result, "result");
  if (scale != 1.0) reconstruct_into(facts, nullptr, &facts, open, scale);
  return result;
}

void zero(const Tensor& matrix) { check_torch(aoti_torch_zero_(matrix.get()), "zero_"); }

}  // namespace

Tensor mixed_lowrank(const Tensor& input, const std::vector<OptionalTensor>& a, const std::vector<OptionalTensor>& b,
                     const Tensor& task_ids, const std::vector<double>& scales) {
  const NoGrad no_grad;
  const Described x = describe(input, "input");
  const int64_t rows = rows_in(x, "input"), inputs = x.sizes[static_cast<size_t>(x.ndim() - 1)];
  const Factors factors(a, b, scales, x, inputs);
  check_ids(task_ids, x.place);
  const int64_t per = per_sample(rows, task_ids.numel(), "input");
  const auto tasks = static_cast<int64_t>(factors.a.size());
  const std::vector<Group> groups = grouped(read_ids(task_ids, tasks), tasks,
                                            [&](int64_t task) { return factors.ranks[static_cast<size_t>(task)] < 0; });
  const Tensor y = activation(x, factors.outputs);
  const Tensor y2 = matrix_view(y, rows, factors.outputs), x2 = in_samples(as_matrix(x, rows, inputs), groups);
  OptionalTensor spare_x, spare_y;
  for (const Group& group : groups) {
    const Part to(y2, group.at, per, Use::kWrite, &spare_y);
    if (group.task < 0) {
      zero(to.tensor());
    } else {
      const auto task = static_cast<size_t>(group.task);
      const Part from(x2, group.at, per, Use::kRead, &spare_x);
      const Tensor inner = scaled_product(from.tensor(), *factors.a[task], scales[task]);
      call("aten::linear", "out", inner, *factors.b[task], std::nullopt, to.tensor());
    }
    to.put();
  }
  return y;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> mixed_lowrank_backward(
    const Tensor& grad_output, const Tensor& input, const std::vector<OptionalTensor>& a,
    const std::vector<OptionalTensor>& b, const Tensor& task_ids, const std::vector<double>& scales, bool input_mask,
    const std::vector<bool>& a_mask, const std::vector<bool>& b_mask) {
  const NoGrad no_grad;
  const Described x = describe(input, "input"), dy = describe(grad_output, "grad_output");
  const int64_t rows = rows_in(x, "input"), inputs = x.sizes[static_cast<size_t>(x.ndim() - 1)];
  const Factors factors(a, b, scales, x, inputs);
  check_ids(task_ids, x.place);
  const int64_t per = per_sample(rows, task_ids.numel(), "input");
  const Ints expected = activation_shape(x, factors.outputs);
  expect_shape(dy, "grad_output", Span(expected.data(), expected.size()));
  expect_place(dy, "grad_output", x, "input");
  if (dy.dtype != x.dtype) {
    fail("grad_output: expected dtype ", to_string(x.dtype), " like input, got ", to_string(dy.dtype));
  }
  const size_t count = factors.a.size();
  for (const auto& [mask, name] : {std::pair{&a_mask, "a_mask"}, std::pair{&b_mask, "b_mask"}}) {
    if (mask->size() != count) fail(name, ": expected ", count, " bools, got ", mask->size());
    for (size_t task = 0; task < count; ++task) {
      if ((*mask)[task] && factors.ranks[task] < 0) fail(name, "[", task, "]: expected false, the task has no factors");
    }
  }
  const auto tasks = static_cast<int64_t>(count);
  const std::vector<Group> groups = grouped(read_ids(task_ids, tasks), tasks,
                                            [&](int64_t task) { return factors.ranks[static_cast<size_t>(task)] < 0; });
  const Tensor x2 = in_samples(as_matrix(x, rows, inputs), groups);
  const Tensor dy2 = in_samples(as_matrix(dy, rows, factors.outputs), groups);
  OptionalTensor dinput, dx2, spare_x, spare_dy, spare_dx;
  if (input_mask) {
    dinput = activation(x, inputs);
    dx2 = matrix_view(*dinput, rows, inputs);
  }
  std::vector<OptionalTensor> da(count), db(count);
  for (const Group& group : groups) {
    if (group.task < 0) {
      if (!input_mask) continue;
      const Part to(*dx2, group.at, per, Use::kWrite, &spare_dx);
      zero(to.tensor());
      to.put();
      continue;
    }
    const auto task = static_cast<size_t>(group.task);
    const Tensor &down = *factors.a[task], &up = *factors.b[task];
    const Part from(dy2, group.at, per, Use::kRead, &spare_dy);
    OptionalTensor inner;  // the gradient of x A^T
    if (input_mask || a_mask[task]) inner = scaled_product(from.tensor(), transposed(up), scales[task]);
    if (input_mask) {
      const Part to(*dx2, group.at, per, Use::kWrite, &spare_dx);
      call("aten::mm", "out", *inner, down, to.tensor());
      to.put();
    }
    if (!a_mask[task] && !b_mask[task]) continue;
    const Part own(x2, group.at, per, Use::kRead, &spare_x);
    if (a_mask[task]) {
      da[task] = empty_like(describe(down, "a"));
      call("aten::mm", "out", transposed(*inner), own.tensor(), *da[task]);
    }
    if (b_mask[task]) {
      db[task] = empty_like(describe(up, "b"));
      call("aten::mm", "out", transposed(from.tensor()), scaled_product(own.tensor(), down, scales[task]), *db[task]);
    }
  }
  const auto listed = [&](const std::vector<OptionalTensor>& found, const std::vector<bool>& mask,
                          const std::vector<OptionalTensor>& like) {
    std::vector<Tensor> list;
    for (size_t task = 0; task < count; ++task) {
      list.push_back(!mask[task]   ? no_tensor(x.dtype, x.place)
                     : found[task] ? *found[task]
                                   : zeros_like(describe(*like[task], "factor")));
    }
    return list;
  };
  return {dinput ? *dinput : no_tensor(x.dtype, x.place), listed(da, a_mask, factors.a), listed(db, b_mask, factors.b)};
}

}  // namespace taps
