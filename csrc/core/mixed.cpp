#include "core/mixed.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace taps {

TaskWeights::TaskWeights(const Tensor& weight, const std::vector<OptionalTensor>& given_deltas,
                         const std::vector<OptionalTensor>& given_scores, const Ints& gates, double threshold,
                         int64_t ndim)
    : deltas(given_deltas), scores(given_scores) {
  const auto expect_count = [&](size_t count, const char* name) {
    if (count != deltas.size()) fail(name, ": expected ", deltas.size(), " entries like deltas, got ", count);
  };
  expect_count(scores.size(), "scores");
  expect_count(gates.size(), "gates");
  base = check_weight(weight, std::nullopt, std::nullopt, std::nullopt, threshold, ndim);
  for (std::vector<OptionalTensor>* list : {&deltas, &scores}) {
    for (OptionalTensor& tensor : *list) {  // in lists of optional tensors torch leaves negated views to the operator
      if (tensor) tensor = call("aten::resolve_neg", "", *tensor);
    }
  }
  tasks.reserve(deltas.size());
  for (size_t task = 0; task < deltas.size(); ++task) {
    if (gates[task] < -1 || gates[task] > 1) {
      fail("gates[", task, "]: expected 1, 0, or -1 for unknown, got ", gates[task]);
    }
    const std::optional<bool> gate = gates[task] < 0 ? std::nullopt : std::optional<bool>(gates[task] == 1);
    try {
      tasks.push_back(check_weight(weight, deltas[task], scores[task], gate, threshold, ndim));
    } catch (const std::runtime_error& error) {
      fail("task ", task, ": ", error.what());
    }
  }
}

void check_ids(const Tensor& task_ids, Place place) {
  int64_t ndim = 0;
  int32_t dtype = 0, device_type = 0, index = 0;
  check_torch(aoti_torch_get_dim(task_ids.get(), &ndim), "task_ids");
  check_torch(aoti_torch_get_dtype(task_ids.get(), &dtype), "task_ids");
  check_torch(aoti_torch_get_device_type(task_ids.get(), &device_type), "task_ids");
  check_torch(aoti_torch_get_device_index(task_ids.get(), &index), "task_ids");
  if (ndim != 1 || dtype != aoti_torch_dtype_int64()) {
    fail("task_ids: expected int64 of shape [B], got ", ndim, " dimensions of dtype ", name_of_dtype(dtype));
  }
  const bool cuda = device_type == aoti_torch_device_type_cuda();
  if ((!cuda && device_type != aoti_torch_device_type_cpu()) || (cuda && !(Place{cuda, index} == place))) {
    fail("task_ids: expected a tensor on the CPU, or on ", to_string(place), " like weight");
  }
  const int64_t count = task_ids.numel(), step = task_ids.stride(0);
  if (count > 1 && step == 0) {  // no memory bounds how many there are
    fail("task_ids: expected memory for each of the ids, got one that is expanded to ", count);
  }
  expect_memory(task_ids, Span(&count, 1), Span(&step, 1), sizeof(int64_t), "task_ids");
}

int64_t per_sample(int64_t total, int64_t samples, const char* name) {
  if (samples == 0 ? total != 0 : total % samples != 0) {
    fail(name, ": expected a multiple of the ", samples, " task_ids in its leading dimensions, got ", total);
  }
  return samples == 0 ? 0 : total / samples;
}

std::vector<int64_t> read_ids(const Tensor& task_ids, int64_t tasks) {
  const int64_t count = task_ids.numel(), step = task_ids.stride(0);
  const int64_t* const from = static_cast<const int64_t*>(task_ids.data_ptr());
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t sample = 0; sample < count; ++sample) {
    const int64_t id = from[sample * step];
    if (id < -1 || id >= tasks) {
      fail("task_ids[", sample, "]: expected -1 for the base, or one of ", tasks, " tasks, got ", id);
    }
    ids[static_cast<size_t>(sample)] = id;
  }
  return ids;
}

// --- rows where they are, or gathered ------------------------------------------------------------

Tensor narrowed(const Tensor& tensor, int64_t first, int64_t count) {
  const Described whole = describe(tensor, "activation");
  Ints sizes(whole.sizes.begin(), whole.sizes.end());
  sizes[0] = count;
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(tensor.get(), whole.ndim(), sizes.data(), whole.strides.data(),
                                             count > 0 ? first * whole.strides[0] : 0, &handle),
              "view");
  return Tensor(handle);
}

namespace {

// bytes[i] of `apart` at at[i] and of `together` at i, from one to the other.
template <class Copy>
void for_samples(const std::vector<int64_t>& at, int64_t bytes, const Copy& copy) {
  constexpr int64_t kGrain = 1 << 16;  // bytes: fewer are one thread's
  const int64_t grain = bytes >= kGrain ? 1 : kGrain / (bytes > 0 ? bytes : 1);
  cpu::parallel_for(static_cast<int64_t>(at.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy(at[static_cast<size_t>(i)] * bytes, i * bytes);
  });
}

int64_t sample_bytes(const Tensor& tensor, int64_t per) {
  const int64_t count = tensor.size(0);
  return count > 0 ? tensor.numel() / count * per * static_cast<int64_t>(tensor.element_size()) : 0;
}

}  // namespace

Part::Part(const Tensor& whole, const std::vector<int64_t>& at, int64_t per, Use use, OptionalTensor* spare)
    : whole_(whole), at_(at), bytes_(sample_bytes(whole, per)) {
  const int64_t count = static_cast<int64_t>(at.size());
  own_ = at.back() - at.front() + 1 != count;
  if (own_ && describe(whole, "activation").place.cuda) fail("samples of a task: expected them behind each other");
  if (!own_) {
    tensor_ = narrowed(whole, at.front() * per, count * per);
    return;
  }
  if (spare == nullptr || !*spare || (*spare)->size(0) < count * per) {
    const Described described = describe(whole, "activation");
    Ints sizes(described.sizes.begin(), described.sizes.end());
    sizes[0] = count * per;
    tensor_ = empty_strided(Span(sizes.data(), sizes.size()), described.strides, described.dtype, described.place);
    if (spare != nullptr) *spare = tensor_;
  } else {
    tensor_ = narrowed(**spare, 0, count * per);
  }
  if (use == Use::kWrite) return;
  const char* const from = static_cast<const char*>(whole.data_ptr());
  char* const to = static_cast<char*>(tensor_->data_ptr());
  const auto bytes = static_cast<size_t>(bytes_);
  for_samples(at, bytes_, [&](int64_t apart, int64_t together) { std::memcpy(to + together, from + apart, bytes); });
}

void Part::put() const {
  if (!own_) return;
  char* const to = static_cast<char*>(whole_.data_ptr());
  const char* const from = static_cast<const char*>(tensor_->data_ptr());
  const auto bytes = static_cast<size_t>(bytes_);
  for_samples(at_, bytes_, [&](int64_t apart, int64_t together) { std::memcpy(to + apart, from + together, bytes); });
}

Tensor in_samples(const Tensor& whole, const std::vector<Group>& groups) {
  const Described described = describe(whole, "activation");
  const int64_t count = described.sizes[0];
  const bool dense =
      is_dense(described.sizes, described.strides) && (count < 2 || described.strides[0] * count == described.numel());
  const bool adjacent = std::all_of(groups.begin(), groups.end(), [](const Group& group) { return group.adjacent(); });
  return dense || adjacent ? whole : call("aten::contiguous", "", whole, int32_t{0});
}

void put_samples(const Tensor& from, const std::vector<int64_t>& at, int64_t per, const Tensor& to) {
  const Described result = describe(from, "result"), whole = describe(to, "result");
  bool alike = true;
  for (size_t dim = 0; dim < result.sizes.size(); ++dim) {
    const bool same = result.strides[dim] == whole.strides[dim];
    alike = alike && (same || result.sizes[dim] == 1);
  }
  if (!alike) {
    const Tensor copy = empty_strided(result.sizes, whole.strides, result.dtype, result.place);
    call("aten::copy_", "", copy, from, false);
    return put_samples(copy, at, per, to);
  }
  if (result.place.cuda) {  // behind each other
    call("aten::copy_", "", narrowed(to, at.front() * per, result.sizes[0]), from, false);
    return;
  }
  const int64_t bytes = sample_bytes(from, per);
  char* const behind = static_cast<char*>(to.data_ptr());
  const char* const data = static_cast<const char*>(from.data_ptr());
  for_samples(at, bytes, [&](int64_t apart, int64_t together) {
    std::memcpy(behind + apart, data + together, static_cast<size_t>(bytes));
  });
}

std::vector<int64_t> united(const std::vector<const Group*>& groups) {
  std::vector<int64_t> at;
  for (const Group* group : groups) at.insert(at.end(), group->at.begin(), group->at.end());
  std::sort(at.begin(), at.end());
  return at;
}

// --- gradients -----------------------------------------------------------------------------------

bool MixedWanted::weight_side() const {
  const auto any = [](const std::vector<bool>& mask) {
    return std::find(mask.begin(), mask.end(), true) != mask.end();
  };
  return weight || any(deltas) || any(scores);
}

MixedWanted check_mixed_masks(const std::vector<bool>& input_bias_weight, const std::vector<bool>& delta_mask,
                              const std::vector<bool>& score_mask, const TaskWeights& weights) {
  if (input_bias_weight.size() != 3) fail("input_bias_weight: expected 3 bools, got ", input_bias_weight.size());
  const size_t tasks = weights.tasks.size();
  if (delta_mask.size() != tasks) fail("delta_mask: expected ", tasks, " bools, got ", delta_mask.size());
  if (score_mask.size() != tasks) fail("score_mask: expected ", tasks, " bools, got ", score_mask.size());
  for (size_t task = 0; task < tasks; ++task) {
    if ((delta_mask[task] || score_mask[task]) && !weights.tasks[task].delta) {
      fail("deltas[", task, "]: expected a tensor, a gradient of this task is asked for; got None");
    }
    if (score_mask[task] && !weights.tasks[task].score) {
      fail("scores[", task, "]: expected a tensor, its gradient is asked for; got None");
    }
  }
  return {input_bias_weight[0], input_bias_weight[1], input_bias_weight[2], delta_mask, score_mask};
}

MixedGrads pack_mixed(const TaskWeights& weights, const MixedWanted& wanted, Dtype compute,
                      const OptionalTensor& dinput, const OptionalTensor& dbias, const OptionalTensor& dweight,
                      const TaskGrads& grads) {
  const Place place = weights.base.weight.place;
  const Dtype own = weights.base.weight.dtype;
  std::vector<Tensor> deltas, scores;
  for (size_t task = 0; task < weights.tasks.size(); ++task) {
    const GatedWeight& w = weights.tasks[task];
    const auto add = [&](std::vector<Tensor>& list, bool asked, const OptionalTensor& found,
                         const std::optional<Described>& like, Dtype otherwise) {
      list.push_back(!asked ? no_tensor(like ? like->dtype : otherwise, place) : found ? *found : zeros_like(*like));
    };
    add(deltas, wanted.deltas[task], grads.deltas[task], w.delta, own);
    add(scores, wanted.scores[task], grads.scores[task], w.score, Dtype::kFloat32);
  }
  const auto or_nothing = [&](const OptionalTensor& tensor, Dtype dtype) {
    return tensor ? *tensor : no_tensor(dtype, place);
  };
  return {or_nothing(dinput, compute), or_nothing(dbias, compute), or_nothing(dweight, own), std::move(deltas),
          std::move(scores)};
}

}  // namespace taps
