// W_t = W + g * Delta and the dot product on the twin: all types, alignments, tails, gates and layouts.
#include "elementwise_case.h"

using namespace host;  // NOLINT

namespace {

constexpr How kHow[] = {How::kClosed, How::kOpen, How::kReadClosed, How::kReadOpen};

int problems = 0;

}  // namespace

TAPS_CASE(rebuilt_in_every_type) {
  for (const Dtype out : kDtypes) {
    for (const Dtype weight : kDtypes) {
      for (const Dtype delta : kDtypes) {
        for (const How how : kHow) {
          const int64_t count = 40 + problems % 9, offset = problems % 3 == 0 ? problems % 2 + 1 : 0;
          ++problems;
          if (std::string wrong = check_flat(out, weight, delta, count, offset, how); !wrong.empty()) {
            return std::to_string(static_cast<int>(out)) + std::to_string(static_cast<int>(weight)) +
                   std::to_string(static_cast<int>(delta)) + " gate " + std::to_string(static_cast<int>(how)) + ": " +
                   wrong;
          }
        }
      }
    }
  }
  return "";
}

// Less than a vector, less than a block, and a grid that goes round several times: one multiprocessor holds 8 blocks of
// 256 threads, which take 16,384 elements a time.
TAPS_CASE(rebuilt_in_every_size) {
  for (const int64_t count : {1, 7, 8, 9, 2047, 2049, 16384, 32768 + 13}) {
    for (const int64_t offset : {0, 1}) {
      if (offset == 1 && count > 20000) continue;
      for (const double scale : {1.0, 0.1}) {
        problems += 2;
        std::string wrong = check_flat(Dtype::kBFloat16, Dtype::kBFloat16, Dtype::kFloat32, count, offset,
                                       How::kReadOpen, scale, scale != 1.0);
        if (wrong.empty())
          wrong = check_flat(Dtype::kFloat64, Dtype::kFloat64, Dtype::kFloat32, count, offset, How::kOpen, scale);
        if (!wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

// Into its own operand, as gradients are selected and scaled.
TAPS_CASE(rebuilt_in_place) {
  for (const Dtype dtype : kDtypes) {
    for (const How how : {How::kOpen, How::kReadClosed, How::kReadOpen}) {
      ++problems;
      std::mt19937 random(9);
      Array own(dtype, 1000);
      own.draw(random);
      std::vector<double> before;
      for (int64_t i = 0; i < own.count; ++i) before.push_back(own[i]);
      const float score = how == How::kReadOpen ? 0.2f : 0.05f;
      Reconstruct args;
      args.walk = flat_walk<3>(own.count);
      args.delta = args.out = own.data;
      args.out_dtype = args.delta_dtype = dtype;
      args.scale = 3.0;
      args.gate.open = how == How::kOpen, args.gate.threshold = 0.1;
      if (how != How::kOpen) args.gate.score = &score;
      if (std::string wrong = run(args); !wrong.empty()) return wrong;
      for (int64_t i = 0; i < own.count; ++i) {
        const double want = rebuilt(args, 0.0, before[static_cast<std::size_t>(i)], how != How::kReadClosed);
        if (!own.same(i, want)) return "expected " + std::to_string(want) + ", got " + std::to_string(own[i]);
      }
    }
  }
  return "";
}

TAPS_CASE(rebuilt_from_rows_apart) {
  for (const Dtype dtype : kDtypes) {
    for (const How how : {How::kOpen, How::kReadClosed, How::kReadOpen}) {
      problems += 2;
      std::string wrong = check_strided(dtype, 37, 67, 1, how);
      if (wrong.empty()) wrong = check_strided(dtype, 5, 7, 9, how, how == How::kReadOpen);
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

// Chunks of 16,384 elements: tensors of less, of one, of more, of none, and as many as fit.
TAPS_CASE(many_rebuilt_at_once) {
  const std::vector<std::vector<int64_t>> lists = {
      {5}, {16384, 16383, 16385, 1}, {40000, 0, 3, 33000, 0}, {0}, std::vector<int64_t>(taps::kMostTensors, 67)};
  for (const std::vector<int64_t>& counts : lists) {
    for (const bool in_double : {false, true}) {
      ++problems;
      if (std::string wrong = check_foreach(counts, in_double, counts.size() % 3); !wrong.empty()) return wrong;
    }
  }
  return "";
}

TAPS_CASE(many_settled_at_once) {
  const std::vector<std::vector<int64_t>> lists = {
      {5}, {16384, 16383, 16385, 1}, {40000, 3, 17325, 9, 2049}, std::vector<int64_t>(taps::kMostTensors, 67)};
  for (const std::vector<int64_t>& counts : lists) {
    for (uint64_t seed = 0; seed < (counts.size() > 9 ? 1 : 12); ++seed) {
      for (const bool in_double : {false, true}) {
        ++problems;
        if (std::string wrong = check_settle(counts, in_double, seed); !wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

TAPS_CASE(products_of_every_type) {
  for (const Dtype first : kDtypes) {
    for (const Dtype second : kDtypes) {
      ++problems;
      if (std::string wrong = check_dot(first, second, 1, 300 + problems % 9, 0, problems % 3); !wrong.empty())
        return wrong;
    }
  }
  return "";
}

TAPS_CASE(products_of_every_size) {
  for (const int64_t count : {0, 1, 8, 255, 16384, 16385, 40003}) {
    ++problems;
    std::string wrong = check_dot(Dtype::kBFloat16, Dtype::kFloat32, 1, count, 0, count % 2);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

TAPS_CASE(products_of_rows_apart) {
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3, 5}, {301, 71}, {5, 9000}}) {
    ++problems;
    std::string wrong = check_dot(Dtype::kFloat32, Dtype::kBFloat16, rows, columns, 3, 0);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// More sums of chunks than threads, as of more than four million elements.
TAPS_CASE(many_chunks_added) {
  ++problems;
  std::mt19937 random(2);
  Array values(Dtype::kFloat64, 1000);
  values.draw(random);
  double want = 0.0, size = 0.0;
  for (int64_t i = 0; i < values.count; ++i) want += values[i], size += std::fabs(values[i]);
  double got = 0.0;
  const auto* const data = reinterpret_cast<const double*>(values.data);
  std::string wrong = none(
      twin::launch({1}, kThreads, kDotShared, [&] { dot_finish(data, values.count, 0.1, &got, Dtype::kFloat64); }));
  if (!wrong.empty()) return wrong;
  if (std::fabs(got - 0.1 * want) <= 0.1 * size * 1002 * 0x1p-53) return "";
  return "expected " + std::to_string(0.1 * want) + ", got " + std::to_string(got);
}

TAPS_CASE(gates_at_the_threshold) {
  ++problems;
  return check_gates();
}

int main() {
  const int failed = run_all();
  std::printf("%d problems\n", problems);
  return failed;
}
