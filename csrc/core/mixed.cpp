#include "core/mixed.h"

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
  if ((!cuda && device_type != aoti_torch_device_type_cpu()) || !(Place{cuda, index} == place)) {
    fail("task_ids: expected a tensor on ", to_string(place), " like weight");
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

}  // namespace

Part::Part(const Tensor& whole, const std::vector<int64_t>& at, int64_t per, Use use, OptionalTensor* spare)
    : whole_(whole), at_(at) {
  const int64_t count = static_cast<int64_t>(at.size()), rows = count * per;
  const Described described = describe(whole, "activation");
  bytes_ = described.sizes[0] > 0 ? described.numel() / described.sizes[0] * per * size_of(described.dtype) : 0;
  own_ = at.back() - at.front() + 1 != count;
  if (!own_) {
    matrix_ = narrowed(whole, at.front() * per, rows);
    return;
  }
  if (spare == nullptr || !*spare || (*spare)->size(0) < rows) {
    Ints sizes(described.sizes.begin(), described.sizes.end());
    sizes[0] = rows;
    matrix_ = empty_strided(Span(sizes.data(), sizes.size()), described.strides, described.dtype, described.place);
    if (spare != nullptr) *spare = matrix_;
  } else {
    matrix_ = narrowed(**spare, 0, rows);
  }
  if (use == Use::kWrite) return;
  const char* const from = static_cast<const char*>(described.data());
  char* const to = static_cast<char*>(matrix_->data_ptr());
  for_samples(at, bytes_, [&](int64_t apart, int64_t together) {
    std::memcpy(to + together, from + apart, static_cast<size_t>(bytes_));
  });
}

void Part::put() const {
  if (!own_) return;
  char* const to = static_cast<char*>(whole_.data_ptr());
  const char* const from = static_cast<const char*>(matrix_->data_ptr());
  for_samples(at_, bytes_, [&](int64_t apart, int64_t together) {
    std::memcpy(to + apart, from + together, static_cast<size_t>(bytes_));
  });
}

}  // namespace taps
