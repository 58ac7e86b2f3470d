// The products of mixed batches on the twin: orders of every kind, tasks without rows, with one, with more than a tile,
// ids of no task, gates known and read, any leading dimension, against float64.
#include "mixed_case.h"

using namespace host;  // NOLINT

namespace {

bool every_shape = false;  // with any argument to the program
constexpr Stand kStands[] = {Stand::kOpen, Stand::kRead, Stand::kReadDouble, Stand::kClosed, Stand::kJoins};

std::vector<Stand> stands(size_t count, size_t first = 0) {
  std::vector<Stand> list;
  for (size_t i = 0; i < count; ++i) list.push_back(kStands[(i * i + i + first) % 5]);
  return list;
}

// Batches by name: what a list of ids looks like.
std::vector<std::vector<int64_t>> batches(int64_t tasks, int64_t samples, std::mt19937& random) {
  std::vector<std::vector<int64_t>> all;
  const auto add = [&](auto id) {
    std::vector<int64_t>& list = all.emplace_back();
    for (int64_t i = 0; i < samples; ++i) list.push_back(id(i));
  };
  add([&](int64_t i) { return (i * 7 + 3) % (tasks + 1) - 1; });                                         // unsorted
  add([](int64_t) { return int64_t{-1}; });                                                              // all base
  add([&](int64_t i) { return i % 3 == 1 ? (i % 2 == 0 ? int64_t{-2} : tasks) : tasks - 1; });           // no task
  add([&](int64_t) { return tasks - 1; });                                                               // the last
  add([&](int64_t i) { return (samples - 1 - i) * tasks / samples; });                                   // from the end
  add([&](int64_t) { return static_cast<int64_t>(random() % static_cast<unsigned>(tasks + 3)) - 2; });   // any
  add([&](int64_t i) { return i == 0 ? int64_t{1} << 40 : i == 1 ? -(int64_t{1} << 40) : i % tasks; });  // far away
  return all;
}

template <class T, class W, class D>
std::string activations(Product kind) {
  std::mt19937 random(5);
  int i = 0;
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1}, {3, 17}, {33, 65}, {65, 33}, {64, 136}, {17, 257}, {130, 8}};
  for (const int64_t tasks : {1, 3, 16}) {
    for (const int64_t samples : {1, 5, 33}) {
      for (const int64_t each : {1, 3, 7}) {
        for (const auto& ids : batches(tasks, samples, random)) {
          ++i;
          if (i % (every_shape ? 6 : 24) != 2) continue;
          Mix s;
          s.ids = ids, s.each = each;
          s.tasks = stands(static_cast<size_t>(tasks), static_cast<size_t>(i));
          std::tie(s.n, s.k) = sizes[static_cast<size_t>(i) / (every_shape ? 6 : 24) % 7];
          s.bias = i % 2 == 0, s.seed = static_cast<uint64_t>(i % 5);
          s.padding = i % 7 == 0 ? 8 : i % 7 == 1 ? 2 : i % 7 == 2 ? 1 : 0;
          s.offset = i % 11 == 0 ? 1 : i % 11 == 1 ? 2 : i % 11 == 2 ? 8 : 0;
          s.poisoned = i % 3 == 0 ? 0 : -1, s.spoiled = i % 2 == 0;
          s.ids_step = i % 4 == 0 ? 3 : 1;
          s.launches = i % 5 == 0 && tasks > 1 ? 2 : 1;
          std::string wrong;
          with_mixed_types<T, W, D>(
              kind, [&](auto instance) { wrong = check_mixed<typename decltype(instance)::type, T, W, D>(kind, s); });
          if (!wrong.empty()) return wrong;
          ++host::problems();
        }
      }
    }
  }
  return "";
}

template <class T, class D>
std::string gradients() {
  std::mt19937 random(6);
  int i = 0;
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1}, {3, 17}, {33, 65}, {64, 64}, {65, 33}, {72, 136}};
  for (const int64_t tasks : {1, 3, 7}) {
    for (const int64_t samples : {1, 5, 33}) {
      for (const int64_t each : {1, 3, 7}) {
        for (const auto& ids : batches(tasks, samples, random)) {
          ++i;
          if (i % (every_shape ? 6 : 24) != 2) continue;
          Mix s;
          s.ids = ids, s.each = each;
          s.tasks = stands(static_cast<size_t>(tasks), static_cast<size_t>(i));
          std::tie(s.n, s.k) = sizes[static_cast<size_t>(i) / (every_shape ? 6 : 24) % 6];
          s.seed = static_cast<uint64_t>(i % 5);
          s.padding = i % 7 == 0 ? 8 : i % 7 == 1 ? 2 : i % 7 == 2 ? 1 : 0;
          s.offset = i % 11 == 0 ? 1 : i % 11 == 1 ? 2 : i % 11 == 2 ? 8 : 0;
          s.result = i % 8 != 3, s.dot = i % 8 != 6;
          s.launches = i % 5 == 0 && tasks > 1 ? 2 : 1;
          const std::string wrong = check_mixed_weight<MixedWeightGradient<WeightTile, T, D>, T, D>(s);
          if (!wrong.empty()) return wrong;
          ++host::problems();
        }
      }
    }
  }
  return "";
}

}  // namespace

TAPS_CASE(orders) {
  std::mt19937 random(7);
  int i = 0;
  for (const int64_t tasks : {1, 5, 64, 256}) {
    for (const int64_t samples : {0, 1, 2, 63, 300, 2500}) {
      for (const auto& ids : batches(tasks, samples, random)) {
        ++i;
        if (samples > 63 && i % (samples > 300 ? 9 : 3) != 0) continue;
        Mix s;
        s.ids = ids, s.each = i % 3 == 0 ? 1 : i % 3 == 1 ? 7 : 200, s.n = s.k = 1;
        s.tasks = stands(static_cast<size_t>(tasks), static_cast<size_t>(i));
        s.ids_step = i % 2 + 1, s.seed = static_cast<uint64_t>(i % 3);
        if (std::string wrong = check_order(s, i % 2 == 0 ? 64 : 16); !wrong.empty()) return wrong;
        ++host::problems();
      }
    }
  }
  return "";
}

TAPS_CASE(forward_bf16_delta_bf16) { return activations<bf16, bf16, bf16>(Product::kForward); }
TAPS_CASE(forward_f16_delta_fp32) { return activations<f16, f16, float>(Product::kForward); }
TAPS_CASE(forward_bf16_autocast) { return activations<bf16, float, float>(Product::kForward); }
TAPS_CASE(input_gradient_f16_delta_f16) { return activations<f16, f16, f16>(Product::kInputGradient); }
TAPS_CASE(input_gradient_bf16_delta_fp32) { return activations<bf16, bf16, float>(Product::kInputGradient); }
TAPS_CASE(weight_gradient_bf16_delta_fp32) { return gradients<bf16, float>(); }
TAPS_CASE(weight_gradient_f16_delta_f16) { return gradients<f16, f16>(); }

// 64 tasks with a sample each, and with none for half of them; a task of several tiles.
TAPS_CASE(many_tasks) {
  Mix s;
  s.tasks = stands(64);
  for (int64_t i = 0; i < 64; ++i) s.ids.push_back((i * 37) % 64);
  std::string wrong =
      check_mixed<MixedActivation<MoreRows, bf16, bf16, bf16, false>, bf16, bf16, bf16>(Product::kForward, s);
  for (int64_t& id : s.ids) id = id / 2 * 2;
  s.each = 2;
  if (wrong.empty())
    wrong =
        check_mixed<MixedActivation<MoreRows, bf16, bf16, float, true>, bf16, bf16, float>(Product::kInputGradient, s);
  if (wrong.empty()) wrong = check_mixed_weight<MixedWeightGradient<WeightTile, bf16, float>, bf16, float>(s);
  s.each = 80;
  s.ids = {3, -1, 3, 5, 64, 3, -1};
  s.tasks = stands(6);
  if (wrong.empty())
    wrong = check_mixed<MixedActivation<MoreRows, f16, f16, float, false>, f16, f16, float>(Product::kForward, s);
  if (wrong.empty()) wrong = check_mixed_weight<MixedWeightGradient<WeightTile, f16, f16>, f16, f16>(s);
  return wrong;
}

// A row has the same bits wherever it stands, and whoever is beside it; a task's gradient while its rows keep their
// order.
TAPS_CASE(a_row_does_not_know_its_neighbours) {
  using Body = MixedActivation<MoreRows, bf16, bf16, bf16, false>;
  Mix s;
  s.tasks = {Stand::kOpen, Stand::kRead};
  s.each = 2, s.n = 33, s.k = 130;
  for (int64_t i = 0; i < 50; ++i) s.ids.push_back(i % 3 - 1);
  MixedTensors<bf16, bf16, bf16> t(s);
  const auto run = [&](const Mix& now, const std::vector<int64_t>& from, std::vector<uint16_t>& out) {
    std::vector<bf16> x, y(static_cast<size_t>(now.rows() * s.n));
    for (const int64_t sample : from) {
      for (int64_t at = 0; at < s.each * s.k; ++at)
        x.push_back(t.x.data[(sample * s.each + at / s.k) * t.x.ld + at % s.k]);
    }
    t.ids = now.ids;
    t.args.ids = t.ids.data(), t.args.samples = static_cast<int64_t>(now.ids.size());
    t.args.product.rows = now.rows();
    t.args.product.x = {x.data(), s.k};
    t.args.product.result = y.data(), t.args.product.ld_result = s.n;
    t.take(s, 0, 2);
    std::vector<double> memory;
    const auto found = launch_mixed<Body>(Product::kForward, t.args, memory, 0);
    out.clear();
    for (const bf16 one : y) out.push_back(one.bits);
    return none(found);
  };
  std::vector<int64_t> all, some;
  for (int64_t i = 0; i < 50; ++i) all.push_back(i);
  for (int64_t i = 49; i > 0; i -= 3) some.push_back(i);
  Mix part = s;
  part.ids.clear();
  for (const int64_t sample : some) part.ids.push_back(s.ids[static_cast<size_t>(sample)]);
  std::vector<uint16_t> of_all, of_some;
  std::string wrong = run(s, all, of_all);
  if (wrong.empty()) wrong = run(part, some, of_some);
  if (!wrong.empty()) return wrong;
  const auto row = static_cast<size_t>(s.each * s.n);
  for (size_t i = 0; i < some.size(); ++i) {
    for (size_t at = 0; at < row; ++at) {
      if (of_some[i * row + at] != of_all[static_cast<size_t>(some[i]) * row + at])
        return "sample " + std::to_string(some[i]) + " has other bits";
    }
  }
  return "";
}

TAPS_CASE(samples_of_no_task) {
  std::vector<uint16_t> data(5 * 7, 1);
  const int64_t ids[] = {-1, 3, 2, -2, 0};
  const taps::Spoil args{data.data(), ids, 1, 5, 7, 3};
  const auto found = twin::launch({5}, kThreads, 0, [&] { spoil_sample(args); });
  for (size_t i = 0; i < data.size(); ++i) {
    const uint16_t want = i / 7 == 1 || i / 7 == 3 ? 0xffff : 1;
    if (data[i] != want) return "word " + std::to_string(i) + " is " + std::to_string(data[i]);
  }
  return none(found);
}

// Nothing to do, and nothing to add up.
TAPS_CASE(nothing) {
  using Body = MixedActivation<MoreRows, bf16, bf16, bf16, false>;
  Mix s;
  s.tasks = stands(3);
  std::string wrong = check_mixed<Body, bf16, bf16, bf16>(Product::kForward, s);  // no samples
  s.ids = {0, 2, -1};
  s.each = 0;
  if (wrong.empty()) wrong = check_mixed<Body, bf16, bf16, bf16>(Product::kForward, s);
  if (wrong.empty()) wrong = check_mixed_weight<MixedWeightGradient<WeightTile, bf16, float>, bf16, float>(s);
  s.each = 2, s.k = 0, s.bias = true;
  if (wrong.empty()) wrong = check_mixed<Body, bf16, bf16, bf16>(Product::kForward, s);
  s.k = 40, s.tasks.clear(), s.ids = {-1, -1, 0};
  if (wrong.empty()) wrong = check_mixed<Body, bf16, bf16, bf16>(Product::kForward, s);
  return wrong;
}

int main(int argc, char**) {
  every_shape = argc > 1;
  const int failed = run_all();
  std::printf("%d problems\n", problems());
  return failed;
}
