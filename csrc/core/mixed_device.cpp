#include "core/mixed_device.h"

#include <algorithm>
#include <cstring>

#include "core/device.h"

namespace taps {

bool on_device(const Tensor& task_ids) {
  int32_t type = 0;
  check_torch(aoti_torch_get_device_type(task_ids.get(), &type), "task_ids");
  // In the twin's build ids on the CPU stand for ids on a device where the grouped kernels are forced.
  return type == aoti_torch_device_type_cuda() ||
         (cuda::kTwin && forced_path().load(std::memory_order_relaxed) == static_cast<int>(Path::kFused));
}

void fail_on_device_ids(const char* what) {
  fail("task_ids: expected a tensor on the CPU, because ", what,
       " is rebuilt task by task and kernels never wait for a device; got one on a GPU");
}

bool all_closed(const TaskWeights& weights) {
  return std::all_of(weights.tasks.begin(), weights.tasks.end(), [](const GatedWeight& w) { return w.known_closed(); });
}

Tensor on_host(const std::vector<int64_t>& values) {
  const int64_t count = static_cast<int64_t>(values.size()), stride = 1;
  AtenTensorHandle handle = nullptr;
  check_torch(
      aoti_torch_empty_strided(1, &count, &stride, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle),
      "task_ids");
  const Tensor ids(handle);
  if (!values.empty()) std::memcpy(ids.data_ptr(), values.data(), values.size() * sizeof(int64_t));
  return ids;
}

Tensor to_place(const Tensor& numbers, Place place) {
  if (!place.cuda) return numbers;
  const Tensor pinned = call("aten::pin_memory", "", numbers, std::nullopt);
  const int64_t count = numbers.numel(), stride = 1;
  int32_t dtype = 0;
  check_torch(aoti_torch_get_dtype(numbers.get(), &dtype), "numbers");
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(1, &count, &stride, dtype, aoti_torch_device_type_cuda(), place.index, &handle),
              "numbers");
  const Tensor there(handle);
  call("aten::copy_", "", there, pinned, true);
  return there;
}

void spoil_unknown(const Tensor& result, const Tensor& task_ids, int64_t tasks) {
  const Described facts = describe(result, "result");
  Spoil args;
  args.data = facts.data();
  args.samples = task_ids.numel();
  if (args.samples == 0 || facts.numel() == 0) return;
  args.ids = static_cast<const int64_t*>(task_ids.data_ptr());
  args.ids_step = args.samples > 1 ? task_ids.stride(0) : 1;
  args.words = facts.numel() / args.samples * size_of(facts.dtype) / 2;
  args.all_tasks = tasks;
  cuda::spoil(args, facts.place.index, stream_of(facts.place));
}

std::optional<Order> order_of(const TaskWeights& weights, const Tensor& task_ids, Place place,
                              const std::function<bool(int64_t)>& joins) {
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  const std::vector<int64_t> ids = read_ids(task_ids, tasks);
  const auto rank = [&](int64_t id) {
    return id < 0 || joins(id) ? -1 : weights.of(id).known_closed() ? id : tasks + id;
  };
  std::vector<int64_t> to(ids.size()), back(ids.size()), sorted(ids.size());
  for (size_t i = 0; i < to.size(); ++i) to[i] = static_cast<int64_t>(i);
  std::stable_sort(to.begin(), to.end(), [&](int64_t a, int64_t b) {
    return rank(ids[static_cast<size_t>(a)]) < rank(ids[static_cast<size_t>(b)]);
  });
  if (std::is_sorted(to.begin(), to.end())) return std::nullopt;
  for (size_t i = 0; i < to.size(); ++i) {
    back[static_cast<size_t>(to[i])] = static_cast<int64_t>(i);
    sorted[i] = ids[static_cast<size_t>(to[i])];
  }
  return Order{to_place(on_host(to), place), to_place(on_host(back), place), on_host(sorted)};
}

Tensor in_order(const Tensor& whole, const Tensor& index) {
  const Described given = describe(whole, "activation");
  const bool dense = is_dense(given.sizes, given.strides) &&
                     (given.sizes[0] < 2 || given.strides[0] * given.sizes[0] == given.numel());
  if (!dense) return in_order(call("aten::contiguous", "", whole, int32_t{0}), index);
  const int64_t samples = index.numel(), each = samples > 0 ? given.numel() / samples : 0;
  const int64_t sizes[2] = {samples, each}, strides[2] = {std::max<int64_t>(each, 1), 1};
  const Tensor moved =
      call("aten::index_select", "", reshaped(whole, Span(sizes, 2), Span(strides, 2)), int64_t{0}, index);
  return owned(reshaped(moved, given.sizes, given.strides));
}

// --- grouped -------------------------------------------------------------------------------------

namespace {

bool has_rows(const Described& matrix) {
  return matrix.ndim() == 2 && (matrix.strides[1] == 1 || matrix.sizes[1] == 1) &&
         (matrix.sizes[0] < 2 || matrix.strides[0] >= 0);
}

// Whether a task's Delta is read, or its gradient written.
bool involved(const TaskWeights& weights, const MixedWanted* wanted, size_t task) {
  return !weights.tasks[task].known_closed() || (wanted && wanted->of(static_cast<int64_t>(task)));
}

// Why the grouped kernels do not take these; null where they do. `words`: rows are read quickly, too.
const char* against(const TaskWeights& weights, const MixedWanted* wanted, Dtype compute, bool words) {
  const Described& weight = weights.base.weight;
  if (size_of(compute) != 2) return "a product in another type than bfloat16 and float16";
  const auto lies = [&](const Described& matrix) { return words ? in_rows(matrix) : has_rows(matrix); };
  if (!lies(weight)) return "a weight whose rows' elements are not next to each other";
  std::optional<Dtype> kind;
  for (size_t task = 0; task < weights.tasks.size(); ++task) {
    if (!involved(weights, wanted, task)) continue;
    const Described& delta = *weights.tasks[task].delta;
    if (!lies(delta)) return "a delta whose rows' elements are not next to each other";
    if (kind && *kind != delta.dtype) return "a batch whose deltas are of several types";
    kind = delta.dtype;
  }
  if (!tiles_fuse(weight.dtype, kind ? *kind : Dtype::kFloat32, compute)) {
    return "a weight or delta in another type than the product's and float32";
  }
  return nullptr;
}

LinearProduct product_of(const TaskWeights& weights, const MixedWanted* wanted, Dtype compute, int64_t rows) {
  LinearProduct product;
  set_weight(product, weights.base, compute);
  product.rows = rows;
  product.outputs = weights.base.weight.sizes[0];
  product.inputs = weights.base.weight.sizes[1];
  for (size_t task = 0; task < weights.tasks.size(); ++task) {
    if (involved(weights, wanted, task)) product.delta_dtype = weights.tasks[task].delta->dtype;
  }
  return product;
}

// Launches for as many tasks at a time as a kernel's arguments hold; set(task, its part of them).
template <class Set>
void launch(const TaskWeights& weights, const LinearProduct& product, const Tensor& task_ids, int64_t per, Place place,
            std::initializer_list<Product> kinds, const Set& set) {
  const Tensor ids = on_device(task_ids) ? task_ids : to_place(task_ids, place);
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  MixedBatch args;
  args.product = product;
  args.ids = static_cast<const int64_t*>(ids.data_ptr());
  args.samples = ids.numel();
  args.ids_step = args.samples > 1 ? ids.stride(0) : 1;
  args.each = per;
  args.all_tasks = tasks;
  void* const stream = stream_of(place);
  for (int64_t first = 0; first == 0 || first < tasks; first += kMostTasks) {
    args.first_task = first;
    args.count = static_cast<int32_t>(std::min<int64_t>(tasks - first, kMostTasks));
    for (int32_t i = 0; i < args.count; ++i) {
      const GatedWeight& w = weights.of(first + i);
      MixedTask& task = args.tasks[i] = MixedTask();
      task.gate = w.gate;
      if (w.known_closed()) task.gate.open = false;
      if (!w.known_closed()) task.delta = matrix_of(*w.delta);
      set(static_cast<size_t>(first + i), task);
    }
    const Lease memory(place.cuda, place.index, static_cast<size_t>(cuda::mixed_bytes(args)));
    args.product.memory = memory.data();
    cuda::mixed_order(args, place.index, stream);
    for (const Product kind : kinds) cuda::mixed(kind, args, place.index, stream);
  }
}

}  // namespace

bool groups(const TaskWeights& weights, const MixedWanted* wanted, const Described& activation,
            const Tensor& task_ids) {
  const Dtype compute = activation.dtype;
  constexpr int64_t kMostRows = int64_t{1} << 31;
  if (on_device(task_ids)) {
    const char* const reason = against(weights, wanted, compute, false);
    if (reason) fail_on_device_ids(reason);
    if (activation.sizes[0] >= kMostRows) fail_on_device_ids("a batch of 2147483648 rows and more");
    return true;
  }
  const auto tasks = static_cast<int64_t>(weights.tasks.size());
  const GatedWeight* open = nullptr;
  const std::vector<Group> present = grouped(read_ids(task_ids, tasks), tasks, [&](int64_t task) {
    return !involved(weights, wanted, static_cast<size_t>(task));
  });
  for (const Group& group : present) {
    if (group.task >= 0) open = &weights.of(group.task);
  }
  if (!open || present.size() < 2) return false;  // one layer's
  const bool known = !against(weights, wanted, compute, true) && fusable_activation(activation) &&
                     weights.base.weight.numel() > 0 && activation.sizes[0] < kMostRows;
  const int64_t rows = activation.sizes[0] / static_cast<int64_t>(present.size());
  if (path_for(*open, compute, rows, known) != Path::kFused) return false;
  return !wanted || !wanted->weight_side() || gradient_path_for(*open, compute, rows, known) == Path::kFused;
}

void grouped_forward(const TaskWeights& weights, const Tensor& x, const Tensor& task_ids, int64_t per,
                     const OptionalTensor& bias, const Tensor& y) {
  const Described given = describe(x, "input");
  const Tensor rows = has_rows(given) ? x : call("aten::contiguous", "", x, int32_t{0});
  const Described matrix = describe(rows, "input");
  LinearProduct product = product_of(weights, nullptr, matrix.dtype, matrix.sizes[0]);
  product.x = matrix_of(matrix);
  product.bias = data_of(bias);
  product.result = y.data_ptr();
  product.ld_result = product.outputs;
  launch(weights, product, task_ids, per, matrix.place, {Product::kForward},
         [&](size_t task, MixedTask& one) { one.joins = weights.tasks[task].known_closed(); });
}

TaskGrads grouped_backward(const TaskWeights& weights, const MixedWanted& wanted, const Tensor& dy,
                           const OptionalTensor& x, const Tensor& task_ids, int64_t per, const OptionalTensor& dx) {
  const auto in_matrix = [](const Tensor& given) {
    return has_rows(describe(given, "activation")) ? given : call("aten::contiguous", "", given, int32_t{0});
  };
  const Tensor rows_dy = in_matrix(dy);
  const OptionalTensor rows_x = x ? OptionalTensor(in_matrix(*x)) : std::nullopt;
  const Described matrix = describe(rows_dy, "grad_output");
  LinearProduct product = product_of(weights, &wanted, matrix.dtype, matrix.sizes[0]);
  product.dy = matrix_of(matrix);
  if (rows_x) product.x = matrix_of(describe(*rows_x, "input"));
  if (dx) product.result = dx->data_ptr();
  product.ld_result = product.inputs;
  TaskGrads grads(weights.tasks.size());
  bool weight_side = false;
  const auto set = [&](size_t task, MixedTask& one) {
    const GatedWeight& w = weights.tasks[task];
    const bool closed = w.known_closed();
    one.joins = closed && !wanted.scores[task];
    if (wanted.deltas[task] && closed) grads.deltas[task] = zeros_like(*w.delta);
    if (wanted.deltas[task] && !closed) {
      grads.deltas[task] = empty_like(*w.delta);
      one.delta_gradient = grads.deltas[task]->data_ptr();
      one.ld_gradient = matrix_of(describe(*grads.deltas[task], "gradient")).ld;
    }
    if (wanted.scores[task]) {
      one.delta = matrix_of(*w.delta);
      grads.scores[task] = empty_like(*w.score);
      one.score_gradient = grads.scores[task]->data_ptr();
      one.score_dtype = w.score->dtype;
    }
    weight_side = weight_side || one.delta_gradient || one.score_gradient;
  };
  for (size_t task = 0; task < weights.tasks.size(); ++task) {
    weight_side = weight_side || wanted.scores[task] || (wanted.deltas[task] && !weights.tasks[task].known_closed());
  }
  if (dx && weight_side) {
    launch(weights, product, task_ids, per, matrix.place, {Product::kInputGradient, Product::kWeightGradient}, set);
  } else if (dx) {
    launch(weights, product, task_ids, per, matrix.place, {Product::kInputGradient}, set);
  } else if (weight_side) {
    launch(weights, product, task_ids, per, matrix.place, {Product::kWeightGradient}, set);
  }
  for (size_t task = 0; task < weights.tasks.size(); ++task) {
    const GatedWeight& w = weights.tasks[task];
    if (wanted.deltas[task] && !grads.deltas[task]) grads.deltas[task] = zeros_like(*w.delta);
    if (wanted.scores[task] && w.known_closed()) {
      expect_finite_score(w, describe(*grads.scores[task], "score gradient"));
    }
  }
  return grads;
}

}  // namespace taps
