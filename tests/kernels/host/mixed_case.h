// One product of a mixed batch on the twin, against float64: every task's Delta in an allocation of its exact size, NaN
// where nothing may read it, and rows that belong to no task.
#pragma once

#include <cmath>

#include "cuda/mixed.cuh"
#include "linear_case.h"

namespace host {

using taps::MixedBatch;
using taps::MixedTask;
using taps::MixedTile;

// How a task stands to the base.
enum class Stand {
  kOpen,
  kRead,        // open by a score that the device reads
  kReadDouble,  // the same in fp64, closed
  kClosed,      // known to be closed, with a group of its own
  kJoins,       // known to be closed, among the base's rows
};

struct Mix {
  std::vector<int64_t> ids;
  std::vector<Stand> tasks;
  int64_t each = 1, n = 40, k = 72;
  bool bias = false;
  int64_t padding = 0, offset = 0, ids_step = 1;
  bool padded_weights = true;  // or the activations alone
  bool spoiled = true;         // rows of no task are NaN, so that they show where they should not be
  int poisoned = -1;           // a task whose Delta is NaN: it spoils its own rows alone
  uint64_t seed = 0;
  bool result = true, dot = true;  // of the weight gradient
  int launches = 1;                // that share the tasks

  int64_t rows() const { return static_cast<int64_t>(ids.size()) * each; }
  bool open(int64_t task) const {
    return task >= 0 &&
           (tasks[static_cast<size_t>(task)] == Stand::kOpen || tasks[static_cast<size_t>(task)] == Stand::kRead);
  }
  bool known(int64_t id) const { return id >= -1 && id < static_cast<int64_t>(tasks.size()); }
  std::string name() const {
    std::string text = std::to_string(rows()) + " x " + std::to_string(n) + " x " + std::to_string(k) + ", " +
                       std::to_string(tasks.size()) + " tasks, each " + std::to_string(each) + ", ids";
    for (size_t i = 0; i < ids.size() && i < 12; ++i) text += " " + std::to_string(ids[i]);
    return text;
  }
};

template <class T, class W, class D>
struct MixedTensors {
  std::mt19937 random;
  Filled<T> x, dy, bias;
  Filled<W> weight;
  std::vector<Filled<D>> deltas, gradients;
  std::vector<float> scores;
  std::vector<double> wide_scores, score_gradients;
  std::vector<int64_t> ids;
  MixedBatch args;

  explicit MixedTensors(const Mix& s)
      : random(static_cast<unsigned>(s.rows() * 131071 + s.n * 8191 + s.k)),
        x(s.rows(), s.k, s.padding, s.offset, random, 1.0f),
        dy(s.rows(), s.n, s.padding, s.offset, random, 1.0f),
        bias(1, s.n, 0, 0, random, 1.0f),
        weight(s.n, s.k, s.padded_weights ? s.padding : 0, s.padded_weights ? s.offset : 0, random, 0.2f),
        scores(s.tasks.size()),
        wide_scores(s.tasks.size()),
        score_gradients(s.tasks.size(), 7.0),
        ids(s.ids.size() * static_cast<size_t>(s.ids_step), 99) {
    for (size_t i = 0; i < s.ids.size(); ++i) {
      ids[i * static_cast<size_t>(s.ids_step)] = s.ids[i];
      if (s.known(s.ids[i]) || !s.spoiled) continue;
      for (int64_t row = static_cast<int64_t>(i) * s.each; row < static_cast<int64_t>(i + 1) * s.each; ++row) {
        for (int64_t c = 0; c < s.k; ++c) x.data[row * x.ld + c] = from_f32<T>(std::nanf(""));
        for (int64_t c = 0; c < s.n; ++c) dy.data[row * dy.ld + c] = from_f32<T>(std::nanf(""));
      }
    }
    LinearProduct& p = args.product;
    p.rows = s.rows(), p.outputs = s.n, p.inputs = s.k;
    p.weight = weight.matrix();
    p.compute = dtype_of<T>(), p.weight_dtype = dtype_of<W>(), p.delta_dtype = dtype_of<D>();
    args.ids = ids.data(), args.ids_step = s.ids_step;
    args.samples = static_cast<int64_t>(s.ids.size()), args.each = s.each;
    args.all_tasks = static_cast<int64_t>(s.tasks.size());
    for (size_t task = 0; task < s.tasks.size(); ++task) {
      const bool nothing = !s.open(static_cast<int64_t>(task)) || static_cast<int>(task) == s.poisoned;
      deltas.emplace_back(s.n, s.k, s.padded_weights ? s.padding : 0, s.padded_weights ? s.offset : 0, random,
                          nothing ? std::nanf("") : 0.2f);
      gradients.emplace_back(s.n, s.k, s.padding, s.offset, random, 0.0f);
      scores[task] = 0.1f;  // at the threshold, in fp32
      wide_scores[task] = 0.0999;
    }
  }

  // The tasks of one launch of several.
  void take(const Mix& s, int64_t first, int64_t count) {
    args.first_task = first, args.count = static_cast<int32_t>(count);
    for (int64_t i = 0; i < count; ++i) {
      const auto task = static_cast<size_t>(first + i);
      const Stand stand = s.tasks[task];
      MixedTask one;
      one.gate.open = stand == Stand::kOpen || stand == Stand::kReadDouble;  // of two that differ the score counts
      one.gate.threshold = 0.1;
      if (stand == Stand::kRead) one.gate.score = &scores[task];
      if (stand == Stand::kReadDouble) one.gate.score = &wide_scores[task], one.gate.score_dtype = Dtype::kFloat64;
      if (stand != Stand::kClosed && stand != Stand::kJoins) one.delta = deltas[task].matrix();
      one.joins = stand == Stand::kJoins;
      args.tasks[i] = one;
    }
  }
  double weight_t(const Mix& s, int64_t task, int64_t n, int64_t k) const {
    const auto own = static_cast<float>(weight(n, k));
    return operand<T>(s.open(task) ? own + static_cast<float>(deltas[static_cast<size_t>(task)](n, k)) : own);
  }
};

// Runs as mixed.cu launches it: the order, then the product.
template <class Body>
std::vector<twin::Finding> launch_mixed(Product kind, MixedBatch& args, std::vector<double>& memory, uint64_t seed) {
  using S = typename Body::Tile;
  args.product.memory = nullptr, args.tile = S::kRows;
  const int64_t bytes = mixed_parts<S>(args);
  memory.assign(static_cast<size_t>(bytes + 7) / 8, std::numeric_limits<double>::quiet_NaN());
  args.product.memory = memory.data();
  mixed_parts<S>(args);
  // What is not set may not be used: as numbers of rows these are too large.
  char* const end = reinterpret_cast<char*>(memory.data() + memory.size());
  for (char* at = reinterpret_cast<char*>(args.tiles); at && at != end; ++at) *at = 2;
  auto found = twin::launch({1}, kThreads, kOrderShared, [&] { order_samples(args); }, seed);
  const Grid grid = mixed_grid<S>(kind, args);
  if (!found.empty() || grid.tiles == 0 || grid.splits == 0) return found;
  found = twin::launch(
      {grid.tiles, grid.splits}, Body::Tile::kThreads, Body::Loop::kShared, [&] { Body::run(args); }, seed);
  if (kind != Product::kWeightGradient || !args.partials || !found.empty()) return found;
  return twin::launch(
      {static_cast<unsigned>(args.count)}, kThreads, kDotShared,
      [&] { mixed_scores(args, static_cast<int64_t>(grid.tiles)); }, seed);
}

inline std::string differs(const Mix& s, const std::string& where, double want, double got) {
  return s.name() + ", " + where + ": expected " + std::to_string(want) + ", got " + std::to_string(got);
}

// The order by itself, to the number.
inline std::string check_order(const Mix& s, int tile) {
  MixedTensors<bf16, bf16, bf16> t(s);
  t.take(s, 0, static_cast<int64_t>(s.tasks.size()));
  t.args.tile = tile;
  std::vector<double> memory(static_cast<size_t>(mixed_parts(t.args) + 7) / 8, -1.0);
  t.args.product.memory = memory.data();
  mixed_parts(t.args);
  const auto found = twin::launch({1}, kThreads, kOrderShared, [&] { order_samples(t.args); }, s.seed);
  if (!found.empty()) return s.name() + none(found);
  std::vector<std::vector<int32_t>> groups(s.tasks.size() + 2);
  for (size_t i = 0; i < s.ids.size(); ++i) {
    const int64_t id = s.ids[i];
    const bool base = id == -1 || (s.known(id) && s.tasks[static_cast<size_t>(id)] == Stand::kJoins);
    groups[!s.known(id) ? groups.size() - 1
           : base       ? 0
                        : static_cast<size_t>(id) + 1]
        .push_back(static_cast<int32_t>(i));
  }
  int32_t at = 0, slot = 0;
  for (size_t group = 0; group < groups.size(); ++group) {
    if (t.args.starts[group] != at) return differs(s, "start " + std::to_string(group), at, t.args.starts[group]);
    const auto rows = static_cast<int32_t>(groups[group].size()) * static_cast<int32_t>(s.each);
    for (int32_t row = 0; row < rows; row += tile, ++slot) {
      const MixedTile got = t.args.tiles[slot];
      const MixedTile want{static_cast<int32_t>(group), at * static_cast<int32_t>(s.each) + row,
                           std::min(tile, rows - row), 0};
      if (got.group != want.group || got.first != want.first || got.rows != want.rows)
        return differs(s, "tile " + std::to_string(slot), want.first, got.first);
    }
    for (const int32_t sample : groups[group]) {
      if (t.args.order[at] != sample) return differs(s, "order " + std::to_string(at), sample, t.args.order[at]);
      ++at;
    }
  }
  if (t.args.starts[groups.size()] != at) return differs(s, "end", at, t.args.starts[groups.size()]);
  return *t.args.used == slot ? "" : differs(s, "tiles in use", slot, *t.args.used);
}

// y, or dx.
template <class Body, class T, class W, class D>
std::string check_mixed(Product kind, const Mix& s) {
  const bool forward = kind == Product::kForward;
  MixedTensors<T, W, D> t(s);
  const int64_t columns = forward ? s.n : s.k, depth = forward ? s.k : s.n;
  const auto tasks = static_cast<int64_t>(s.tasks.size());
  Filled<T> out(s.rows(), columns, s.padding, s.offset, t.random, 0.0f);
  LinearProduct& p = t.args.product;
  if (forward && s.bias) p.bias = t.bias.data;
  (forward ? p.x : p.dy) = forward ? t.x.matrix() : t.dy.matrix();
  p.result = out.data, p.ld_result = out.ld;
  for (int part = 0; part < s.launches; ++part) {
    const int64_t first = tasks * part / s.launches;
    t.take(s, first, tasks * (part + 1) / s.launches - first);
    std::vector<double> memory;
    const auto found = launch_mixed<Body>(kind, t.args, memory, s.seed);
    if (!found.empty()) return s.name() + none(found);
  }
  for (int64_t r = 0; r < s.rows(); ++r) {
    const int64_t task = s.ids[static_cast<size_t>(r / s.each)];
    const bool nan = !s.known(task) || (task == s.poisoned && s.open(task));
    for (int64_t c = 0; c < columns; ++c) {
      const std::string where = "(" + std::to_string(r) + ", " + std::to_string(c) + ")";
      if (nan) {
        if (depth > 0 || !s.known(task)) {
          if (!std::isnan(out(r, c))) return differs(s, where, std::nan(""), out(r, c));
        }
        continue;
      }
      double want = forward && s.bias ? t.bias(0, c) : 0.0, size = std::fabs(want);
      for (int64_t i = 0; i < depth; ++i) {
        const double product = forward ? operand<T>(t.x(r, i)) * t.weight_t(s, task, c, i)
                                       : operand<T>(t.dy(r, i)) * t.weight_t(s, task, i, c);
        want += product;
        size += std::fabs(product);
      }
      if (!(std::fabs(out(r, c) - want) <= bound<T>(depth + 1, size, want))) return differs(s, where, want, out(r, c));
    }
  }
  return "";
}

// dDelta of each task, and <G, Delta>. Tasks that join the base are asked for nothing.
template <class Body, class T, class D>
std::string check_mixed_weight(const Mix& s) {
  MixedTensors<T, T, D> t(s);
  const auto tasks = static_cast<int64_t>(s.tasks.size());
  LinearProduct& p = t.args.product;
  p.x = t.x.matrix(), p.dy = t.dy.matrix();
  for (int part = 0; part < s.launches; ++part) {
    const int64_t first = tasks * part / s.launches, count = tasks * (part + 1) / s.launches - first;
    t.take(s, first, count);
    for (int64_t i = 0; i < count; ++i) {
      MixedTask& one = t.args.tasks[i];
      const auto task = static_cast<size_t>(first + i);
      if (one.joins) continue;
      if (s.result) one.delta_gradient = t.gradients[task].data, one.ld_gradient = t.gradients[task].ld;
      if (s.dot && one.delta.data) one.score_gradient = &t.score_gradients[task], one.score_dtype = Dtype::kFloat64;
    }
    std::vector<double> memory;
    const auto found = launch_mixed<Body>(Product::kWeightGradient, t.args, memory, s.seed);
    if (!found.empty()) return s.name() + none(found);
  }
  for (int64_t task = 0; task < tasks; ++task) {
    const Stand stand = s.tasks[static_cast<size_t>(task)];
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < s.rows(); ++r) {
      if (s.ids[static_cast<size_t>(r / s.each)] == task) rows.push_back(r);
    }
    double want_dot = 0.0, bound_dot = 0.0;
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t k = 0; k < s.k; ++k) {
        double g = 0.0, size = 0.0;
        for (const int64_t r : rows) {
          const double product = operand<T>(t.dy(r, n)) * operand<T>(t.x(r, k));
          g += product;
          size += std::fabs(product);
        }
        const auto count = static_cast<int64_t>(rows.size());
        const double delta = t.deltas[static_cast<size_t>(task)](n, k);
        want_dot += g * delta;
        bound_dot += bound<float>(count, size, g) * std::fabs(delta);
        const double want = s.open(task) ? g : 0.0, got = t.gradients[static_cast<size_t>(task)](n, k);
        const bool asked = s.result && stand != Stand::kJoins;
        if (!(std::fabs(got - (asked ? want : 0.0)) <= (asked ? bound<D>(count + 1, size, g) : 0.0)))
          return differs(s, "task " + std::to_string(task), want, got);
      }
    }
    if (!s.dot || stand == Stand::kClosed || stand == Stand::kJoins) continue;
    const double got = t.score_gradients[static_cast<size_t>(task)];
    const bool nan = !rows.empty() && (!s.open(task) || task == s.poisoned);  // Delta itself is NaN
    const bool right = nan ? std::isnan(got) : rows.empty() ? got == 0.0 : std::fabs(got - want_dot) <= bound_dot;
    if (!right && s.n * s.k > 0) return differs(s, "score of task " + std::to_string(task), want_dot, got);
  }
  return "";
}

}  // namespace host
