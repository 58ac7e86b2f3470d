// The tile loop on the twin: shapes off every grid, both 16-bit types, Delta in fp32 and in 16 bits, gates known and
// read, split sums, odd leading dimensions and offsets, against float64.
#include <cmath>
#include <limits>
#include <random>

#include "check.h"
#include "cuda/tile.cuh"

using namespace taps::dev;  // NOLINT

namespace {

template <class E>
E number(float value) {
  return from_f32<E>(value);
}

// A matrix whose padding and surroundings are NaN, in an allocation of exactly its size.
template <class E>
struct Matrix {
  std::vector<unsigned char> bytes;
  int64_t ld;
  E* data;
  Matrix(int64_t rows, int64_t columns, int64_t padding, int64_t offset, std::mt19937& random, float scale)
      : bytes((offset + rows * (columns + padding)) * sizeof(E) + 16, 0xff), ld(columns + padding) {
    auto base = reinterpret_cast<uintptr_t>(bytes.data());
    data = reinterpret_cast<E*>((base + 15) / 16 * 16) + offset;
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) data[r * ld + c] = number<E>(normal(random));
    }
  }
};

struct Shape {
  int64_t m, n, k;
  int64_t padding = 0, offset = 0;
  int splits = 1;
};

template <class Tile, class T, class D>
std::string check(const Shape& s, Gate gate, float score, bool with_bias, uint64_t seed) {
  std::mt19937 random(static_cast<unsigned>(s.m * 131071 + s.n * 8191 + s.k));
  const Matrix<T> x(s.m, s.k, s.padding, s.offset, random, 1.0f), w(s.n, s.k, s.padding, s.offset, random, 0.2f);
  const Matrix<D> d(s.n, s.k, s.padding, s.offset, random, 0.2f);
  const Matrix<T> bias(1, s.n, 0, 0, random, 1.0f);
  Matrix<T> y(s.m, s.n, s.padding, s.offset, random, 0.0f);
  std::vector<float> partial(s.splits > 1 ? s.splits * s.m * s.n : 0, std::numeric_limits<float>::quiet_NaN());
  const bool open = gate == Gate::kOpen || (gate == Gate::kRead && score >= 0.1f);
  LinearArgs<T, D> args{};
  args.x = x.data, args.weight = w.data, args.y = y.data, args.bias = with_bias ? bias.data : nullptr;
  args.delta = gate == Gate::kClosed ? nullptr : d.data;  // a closed gate may not look at it
  args.partial = partial.data(), args.score = &score, args.threshold = 0.1f, args.gate = gate;
  args.m = s.m, args.n = s.n, args.k = s.k;
  args.ldx = x.ld, args.ldw = w.ld, args.ldd = d.ld, args.ldy = y.ld;
  args.splits = s.splits;
  args.k_per_split = (s.k + s.splits * Tile::kDepth - 1) / (s.splits * Tile::kDepth) * Tile::kDepth;
  const auto across = static_cast<unsigned>((s.n + Tile::kTileColumns - 1) / Tile::kTileColumns);
  const auto down = static_cast<unsigned>((s.m + Tile::kTileRows - 1) / Tile::kTileRows);
  auto found = twin::launch({across, down, static_cast<unsigned>(s.splits)}, Tile::kThreads, Tile::kShared,
                            [&] { Tile::run(args); }, seed);
  if (s.splits > 1 && found.empty()) {
    const auto blocks = static_cast<unsigned>((s.m * s.n + 63) / 64);
    found = twin::launch({blocks, 1, 1}, 64, 0, [&] { Tile::reduce(args); }, seed);
  }
  const std::string name = std::to_string(s.m) + " x " + std::to_string(s.n) + " x " + std::to_string(s.k) +
                           " gate " + std::to_string(static_cast<int>(gate)) + " splits " + std::to_string(s.splits);
  if (!found.empty()) return name + host::none(found);
  const float unit = sizeof(T) == 2 && std::is_same_v<T, bf16> ? 0x1p-8f : 0x1p-11f;  // half the spacing at 1
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t c = 0; c < s.n; ++c) {
      double want = with_bias ? to_f32(bias.data[c]) : 0.0, size = std::fabs(want);
      for (int64_t k = 0; k < s.k; ++k) {
        const float weight = to_f32(w.data[c * w.ld + k]);
        const float used = open ? to_f32(from_f32<T>(weight + to_f32(d.data[c * d.ld + k]))) : weight;
        const double product = static_cast<double>(to_f32(x.data[r * x.ld + k])) * used;
        want += product;
        size += std::fabs(product);
      }
      // k + splits fp32 additions, each off by 2^-24 of a partial sum of at most `size`, then one rounding to T.
      const double bound = static_cast<double>(s.k + s.splits + 1) * 0x1p-24 * size + unit * std::fabs(want) + 1e-7;
      const double got = to_f32(y.data[r * y.ld + c]);
      if (!(std::fabs(got - want) <= bound)) {
        return name + " at (" + std::to_string(r) + ", " + std::to_string(c) + "): expected " + std::to_string(want) +
               ", got " + std::to_string(got);
      }
    }
  }
  return "";
}

template <class T, class D, int kRows, int kColumns, int kWarpsM, int kWarpsN, int kStages>
struct Tested : LinearTile<T, D, kRows, kColumns, kWarpsM, kWarpsN, kStages> {
  static constexpr int kTileRows = kRows, kTileColumns = kColumns;
};

template <class T, class D>
using Square = Tested<T, D, 64, 64, 2, 2, 3>;
template <class T, class D>
using Flat = Tested<T, D, 16, 64, 1, 4, 4>;  // few rows

constexpr int64_t kSizes[] = {1, 3, 17, 33, 65, 257};

template <class T, class D>
std::string shapes(bool thorough) {
  int i = 0;
  for (const int64_t m : kSizes) {
    for (const int64_t n : kSizes) {
      for (const int64_t k : kSizes) {
        ++i;
        if (!thorough && (m * n * k > 300000 || i % 3 != 0)) continue;
        const Gate gate = i % 4 == 0 ? Gate::kClosed : (i % 4 == 1 ? Gate::kOpen : Gate::kRead);
        const float score = i % 4 == 2 ? 0.1f : 0.05f;
        const Shape shape{m, n, k, 0, 0, i % 5 == 0 ? 3 : 1};
        const bool bias = i % 2 == 0;
        const uint64_t seed = static_cast<uint64_t>(i % 7);
        const std::string problem = m <= 17 ? check<Flat<T, D>, T, D>(shape, gate, score, bias, seed)
                                            : check<Square<T, D>, T, D>(shape, gate, score, bias, seed);
        if (!problem.empty()) return problem;
      }
    }
  }
  return "";
}

bool thorough() { return std::getenv("TAPS_THOROUGH") != nullptr; }

}  // namespace

TAPS_CASE(shapes_bf16_delta_fp32) { return shapes<bf16, float>(thorough()); }
TAPS_CASE(shapes_f16_delta_fp32) { return shapes<f16, float>(thorough()); }
TAPS_CASE(shapes_bf16_delta_bf16) { return shapes<bf16, bf16>(thorough()); }

TAPS_CASE(every_gate_and_split_of_one_shape) {
  for (const Gate gate : {Gate::kClosed, Gate::kOpen, Gate::kRead}) {
    for (const float score : {0.05f, 0.1f, 0.15f}) {
      for (const int splits : {1, 2, 5}) {
        const Shape shape{33, 65, 257, 0, 0, splits};
        const std::string problem = check<Square<bf16, float>, bf16, float>(shape, gate, score, true, 3);
        if (!problem.empty()) return problem;
      }
    }
  }
  return "";
}

// Whole pieces of 16 bytes, rows that start off them, and pointers that do.
TAPS_CASE(leading_dimensions_and_offsets) {
  for (const int64_t padding : {0, 1, 7, 8}) {
    for (const int64_t offset : {0, 1, 8}) {
      const Shape shape{20, 40, 96, padding, offset, 1};
      std::string problem = check<Square<f16, float>, f16, float>(shape, Gate::kOpen, 0, true, 1);
      if (problem.empty()) problem = check<Flat<bf16, bf16>, bf16, bf16>({5, 40, 96, padding, offset, 2}, Gate::kOpen, 0, false, 2);
      if (!problem.empty()) return "padding " + std::to_string(padding) + " offset " + std::to_string(offset) + ": " + problem;
    }
  }
  return "";
}

int main() { return host::run_all(); }
