// A mixed batch: samples of many tasks in any order, each with the weight of its own. Arguments are checked once, the
// samples are put into groups that are one product each, and a group's rows are read and written where they lie, or
// gathered and scattered where they are apart.
#pragma once

#include "core/check.h"

namespace taps {

// W with the Delta and the gate of each task; `base` has none. A task without a Delta is the base.
struct TaskWeights {
  std::vector<OptionalTensor> deltas, scores;  // what the described tensors of `tasks` refer to
  std::vector<GatedWeight> tasks;
  GatedWeight base;

  TaskWeights(const Tensor& weight, const std::vector<OptionalTensor>& deltas,
              const std::vector<OptionalTensor>& scores, const Ints& gates, double threshold, int64_t ndim);
  TaskWeights(const TaskWeights&) = delete;
  TaskWeights& operator=(const TaskWeights&) = delete;

  // The weight of a task, or of the base for -1.
  const GatedWeight& of(int64_t task) const { return task < 0 ? base : tasks[static_cast<size_t>(task)]; }
};

// task_ids [B] of int64 on the CPU or where the activations are: their type, shape and place alone.
void check_ids(const Tensor& task_ids, Place place);

// Rows, or images, of a sample of the batch: `total` are B times as many, sample after sample.
int64_t per_sample(int64_t total, int64_t samples, const char* name);

// Samples that are one product.
struct Group {
  int64_t task = -1;        // -1: those of the base
  std::vector<int64_t> at;  // in ascending order, never empty
  bool adjacent() const { return at.back() - at.front() + 1 == static_cast<int64_t>(at.size()); }
};

// The ids on the CPU, each below `tasks` and -1 or more.
std::vector<int64_t> read_ids(const Tensor& task_ids, int64_t tasks);

// By task, the base's first; `as_base(task)` of those that join it.
template <class AsBase>
std::vector<Group> grouped(const std::vector<int64_t>& ids, int64_t tasks, const AsBase& as_base) {
  std::vector<Group> found(static_cast<size_t>(tasks) + 1);
  for (int64_t task = 0; task < tasks; ++task) found[static_cast<size_t>(task) + 1].task = task;
  for (size_t sample = 0; sample < ids.size(); ++sample) {
    const int64_t id = ids[sample];
    found[id < 0 || as_base(id) ? 0 : static_cast<size_t>(id) + 1].at.push_back(static_cast<int64_t>(sample));
  }
  std::vector<Group> present;
  for (Group& group : found) {
    if (!group.at.empty()) present.push_back(std::move(group));
  }
  return present;
}

// What a mixed backward op is asked for.
struct MixedWanted {
  bool input, bias, weight;
  std::vector<bool> deltas, scores;

  bool of(int64_t task) const {
    return task >= 0 && (deltas[static_cast<size_t>(task)] || scores[static_cast<size_t>(task)]);
  }
  bool weight_side() const;
};
MixedWanted check_mixed_masks(const std::vector<bool>& input_bias_weight, const std::vector<bool>& delta_mask,
                              const std::vector<bool>& score_mask, const TaskWeights& weights);

// The samples of several groups, in ascending order.
std::vector<int64_t> united(const std::vector<const Group*>& groups);

// The rows (images) of some samples in a tensor [B * per, ...] on the CPU: a view where they are adjacent, else a
// tensor of their own. What is not adjacent must lie without gaps, sample behind sample (in_samples).
class Part {
 public:
  enum class Use { kRead, kWrite, kUpdate };

  // `spare`: memory for a tensor of its own, kept for the next part; null where parts live at once.
  Part(const Tensor& whole, const std::vector<int64_t>& at, int64_t per, Use use, OptionalTensor* spare = nullptr);

  const Tensor& tensor() const { return *tensor_; }
  void put() const;  // what was written, to where it belongs

 private:
  const Tensor& whole_;
  const std::vector<int64_t>& at_;
  int64_t bytes_;  // of a sample
  bool own_;
  OptionalTensor tensor_;
};

// The tensor itself, or a copy that is dense, where some of these groups are not adjacent in it.
Tensor in_samples(const Tensor& whole, const std::vector<Group>& groups);

// `from`, one sample behind the other, to where these samples are in `to`, which has its layout.
void put_samples(const Tensor& from, const std::vector<int64_t>& at, int64_t per, const Tensor& to);

// Gradients of Deltas and scores, as far as there are any.
struct TaskGrads {
  std::vector<OptionalTensor> deltas, scores;
  explicit TaskGrads(size_t tasks) : deltas(tasks), scores(tasks) {}
};

using MixedGrads = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>,
                              std::vector<Tensor>>;  // input, bias, weight, Deltas, scores

// One that was not asked for is an empty tensor; of a task without samples, zeros.
MixedGrads pack_mixed(const TaskWeights& weights, const MixedWanted& wanted, Dtype compute,
                      const OptionalTensor& dinput, const OptionalTensor& dbias, const OptionalTensor& dweight,
                      const TaskGrads& grads);

// Rows [first, first + count) of a tensor, a view.
Tensor narrowed(const Tensor& tensor, int64_t first, int64_t count);

}  // namespace taps
