// y = scale_t (x A_t^T) B_t^T for rows of many tasks, and its gradients. On the CPU two small products for each task,
// from its rows where they lie to its rows of the result. On a GPU two batched products for all tasks: every sample
// with the factors of its own, filled up with zeros to the largest rank. That takes any type and ids that nobody reads,
// and gathers factors, not rows: with a rank of 8, a hundredth of a weight for each sample.
#include <algorithm>
#include <cstring>

#include "core/device.h"
#include "core/linear.h"
#include "core/mixed.h"
#include "core/mixed_device.h"
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

// --- batched, where tile kernels run --------------------------------------------------------------

Tensor tensor_of(const Ints& sizes, Dtype dtype, Place place) {
  const Span shape(sizes.data(), sizes.size());
  const Ints strides = contiguous_strides(shape);
  return empty_strided(shape, Span(strides.data(), strides.size()), dtype, place);
}

Tensor zeros(const Ints& sizes, Dtype dtype, Place place) {
  const Tensor made = tensor_of(sizes, dtype, place);
  check_torch(aoti_torch_zero_(made.get()), "zero_");
  return made;
}

Tensor viewed(const Tensor& tensor, const Ints& sizes) {
  const Span shape(sizes.data(), sizes.size());
  const Ints strides = contiguous_strides(shape);
  return reshaped(tensor, shape, Span(strides.data(), strides.size()));
}

// [B, R, C] as [B, C, R].
Tensor turned(const Tensor& tensor) { return call("aten::transpose", "int", tensor, int64_t{1}, int64_t{2}); }

// All factors as [T + 1, R, C] with zeros below the rank and for the last, which is of samples without a task.
Tensor stacked(const std::vector<OptionalTensor>& factors, bool ups, int64_t rank, int64_t columns, Dtype dtype,
               Place place) {
  const Tensor none = zeros({rank, columns}, dtype, place);
  std::vector<Tensor> parts;
  for (const OptionalTensor& factor : factors) {
    const int64_t own = factor ? factor->size(ups ? 1 : 0) : 0;
    if (own > 0) parts.push_back(ups ? transposed(*factor) : *factor);
    if (own < rank) parts.push_back(narrowed(none, 0, rank - own));
  }
  parts.push_back(none);
  const Tensor all = call("aten::cat", "", parts, int64_t{0});
  return viewed(all, {static_cast<int64_t>(factors.size()) + 1, rank, columns});
}

struct Batched {
  int64_t tasks, samples, per, rank, inputs, outputs, together;
  Dtype dtype;
  Place place;
  Tensor slots;       // of each sample, on the device: its task, or T
  Tensor scales;      // [T + 1, 1, 1] in fp32
  Tensor downs, ups;  // [T + 1, R, K], [T + 1, R, N]

  Batched(const Factors& factors, const std::vector<double>& given, const Tensor& task_ids, const Described& x,
          int64_t of_sample, int64_t of_inputs)
      : tasks(static_cast<int64_t>(factors.a.size())),
        samples(task_ids.numel()),
        per(of_sample),
        rank(std::max<int64_t>(*std::max_element(factors.ranks.begin(), factors.ranks.end()), 1)),
        inputs(of_inputs),
        outputs(factors.outputs),
        dtype(x.dtype),
        place(x.place),
        slots(slots_of(task_ids)),
        scales(scales_of(given)),
        downs(stacked(factors.a, false, rank, inputs, dtype, place)),
        ups(stacked(factors.b, true, rank, outputs, dtype, place)) {
    // The factors of so many samples at once are no more than a weight.
    together = std::max<int64_t>(1, inputs * outputs / std::max<int64_t>(1, rank * (inputs + outputs)));
  }

  // Calls each(first, count, their slots) for some samples after the others.
  template <class Each>
  void for_parts(const Each& each) const {
    for (int64_t first = 0; first < samples; first += together) {
      const int64_t count = std::min(samples - first, together), step = 1;
      AtenTensorHandle handle = nullptr;
      check_torch(aoti_torch__reinterpret_tensor(slots.get(), 1, &count, &step, first, &handle), "slots");
      each(first, count, Tensor(handle));
    }
  }
  static Tensor of(const Tensor& stack, const Tensor& slot) {
    return call("aten::index_select", "", stack, int64_t{0}, slot);
  }
  // Times the scale of each sample, rounded once.
  Tensor scaled(const Tensor& inner, const Tensor& slot) const {
    const Tensor product = call("aten::mul", "Tensor", inner, of(scales, slot));
    const Tensor rounded = tensor_of({inner.size(0), inner.size(1), inner.size(2)}, dtype, place);
    call("aten::copy_", "", rounded, product, false);
    return rounded;
  }

 private:
  Tensor slots_of(const Tensor& task_ids) const {
    if (!on_device(task_ids)) {
      std::vector<int64_t> ids = read_ids(task_ids, tasks);
      for (int64_t& id : ids) id = id < 0 ? tasks : id;
      return to_place(on_host(ids), place);
    }
    const Tensor zero = scalar(0), most = scalar(tasks);
    const Tensor valid = call("aten::logical_and", "", call("aten::ge", "Tensor", task_ids, zero),
                              call("aten::lt", "Tensor", task_ids, most));
    return call("aten::where", "self", valid, task_ids, most);
  }
  static Tensor scalar(int64_t value) {
    return reshaped(on_host({value}), Span(nullptr, size_t{0}), Span(nullptr, size_t{0}));
  }
  Tensor scales_of(const std::vector<double>& given) const {
    const Tensor host = tensor_of({tasks + 1}, Dtype::kFloat32, Place{});
    float* const to = static_cast<float*>(host.data_ptr());
    for (int64_t task = 0; task <= tasks; ++task) {
      to[task] = task < tasks ? static_cast<float>(given[static_cast<size_t>(task)]) : 0.0f;
    }
    return viewed(to_place(host, place), {tasks + 1, 1, 1});
  }
};

Tensor part_of(const Tensor& matrix, int64_t first, int64_t count, int64_t per) {
  return viewed(narrowed(matrix, first * per, count * per), {count, per, matrix.size(1)});
}

Tensor in_rows_of(const Tensor& matrix) { return call("aten::contiguous", "", matrix, int32_t{0}); }

void batched_forward(const Batched& b, const Tensor& x2, const Tensor& y2) {
  const Tensor x = in_rows_of(x2);
  b.for_parts([&](int64_t first, int64_t count, const Tensor& slot) {
    const Tensor inner = call("aten::bmm", "", part_of(x, first, count, b.per), turned(Batched::of(b.downs, slot)));
    call("aten::bmm", "out", b.scaled(inner, slot), Batched::of(b.ups, slot), part_of(y2, first, count, b.per));
  });
}

// Gradients of stacks, [T + 1, R, C] in fp32, where there are any; each sample's is added in the batch's order.
struct StackGrads {
  OptionalTensor downs, ups;
};

StackGrads batched_backward(const Batched& b, const Tensor& dy2, const Tensor& x2, const OptionalTensor& dx2,
                            bool of_downs, bool of_ups) {
  const Tensor dy = in_rows_of(dy2), x = in_rows_of(x2);
  StackGrads grads;
  if (of_downs) grads.downs = zeros({b.tasks + 1, b.rank, b.inputs}, Dtype::kFloat32, b.place);
  if (of_ups) grads.ups = zeros({b.tasks + 1, b.rank, b.outputs}, Dtype::kFloat32, b.place);
  const auto add = [&](const Tensor& to, const Tensor& slot, const Tensor& each) {
    const Tensor wide = tensor_of({each.size(0), each.size(1), each.size(2)}, Dtype::kFloat32, b.place);
    call("aten::copy_", "", wide, each, false);
    // Not index_add, whose order on a GPU is that of its atomics: this one sorts.
    call("aten::index_put_", "", to, std::vector<OptionalTensor>{slot}, wide, true);
  };
  b.for_parts([&](int64_t first, int64_t count, const Tensor& slot) {
    const Tensor downs = Batched::of(b.downs, slot), dy3 = part_of(dy, first, count, b.per);
    const Tensor x3 = part_of(x, first, count, b.per);
    if (dx2 || of_downs) {
      const Tensor inner = b.scaled(call("aten::bmm", "", dy3, turned(Batched::of(b.ups, slot))), slot);
      if (dx2) call("aten::bmm", "out", inner, downs, part_of(*dx2, first, count, b.per));
      if (of_downs) add(*grads.downs, slot, call("aten::bmm", "", turned(inner), x3));
    }
    if (of_ups) {
      const Tensor inner = b.scaled(call("aten::bmm", "", x3, turned(downs)), slot);
      add(*grads.ups, slot, call("aten::bmm", "", turned(inner), dy3));
    }
  });
  return grads;
}

// One task's part of a stack's gradient, like its factor.
Tensor factor_gradient(const Tensor& stack, int64_t task, const Tensor& like, bool up) {
  const Tensor grad = empty_like(describe(like, "factor"));
  const int64_t rank = stack.size(1), columns = stack.size(2), own = like.size(up ? 1 : 0);
  const Tensor part = narrowed(viewed(stack, {stack.size(0) * rank, columns}), task * rank, own);
  call("aten::copy_", "", grad, up ? transposed(part) : part, false);
  return grad;
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
  if (on_tiles(x.place)) {
    const Tensor y = activation(x, factors.outputs);
    if (y.numel() == 0) return y;
    const Batched batched(factors, scales, task_ids, x, per, inputs);
    batched_forward(batched, as_matrix(x, rows, inputs), matrix_view(y, rows, factors.outputs));
    if (on_device(task_ids)) spoil_unknown(y, task_ids, tasks);
    return y;
  }
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
  if (on_tiles(x.place)) {
    const auto any = [](const std::vector<bool>& mask) {
      return std::find(mask.begin(), mask.end(), true) != mask.end();
    };
    const OptionalTensor dx = input_mask ? OptionalTensor(activation(x, inputs)) : std::nullopt;
    StackGrads stacks;
    if (x.numel() > 0 && dy.numel() > 0) {
      const Batched batched(factors, scales, task_ids, x, per, inputs);
      const OptionalTensor dx2 = dx ? OptionalTensor(matrix_view(*dx, rows, inputs)) : std::nullopt;
      stacks = batched_backward(batched, as_matrix(dy, rows, factors.outputs), as_matrix(x, rows, inputs), dx2,
                                any(a_mask), any(b_mask));
      if (dx && on_device(task_ids)) spoil_unknown(*dx, task_ids, tasks);
    } else if (dx) {
      zero(*dx);
    }
    std::vector<Tensor> da, db;
    for (size_t task = 0; task < count; ++task) {
      const auto one = [&](bool asked, const OptionalTensor& stack, const OptionalTensor& like, bool up) {
        if (!asked) return no_tensor(x.dtype, x.place);
        return stack ? factor_gradient(*stack, static_cast<int64_t>(task), *like, up)
                     : zeros_like(describe(*like, "factor"));
      };
      da.push_back(one(a_mask[task], stacks.downs, factors.a[task], false));
      db.push_back(one(b_mask[task], stacks.ups, factors.b[task], true));
    }
    return {dx ? *dx : no_tensor(x.dtype, x.place), da, db};
  }
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
