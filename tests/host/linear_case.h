// One case of the tile loop on the twin, against float64: matrices in allocations of their exact size, padding and
// surroundings NaN, so that a tail that reads too far shows.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "cuda/tile.cuh"

namespace host {

using namespace taps::dev;  // NOLINT

template <class E>
E number(float value) {
  return from_f32<E>(value);
}

// A matrix whose padding and surroundings are NaN, in an allocation of exactly its size.
template <class E>
struct Matrix {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t ld;
  E* data;
  Matrix(int64_t rows, int64_t columns, int64_t padding, int64_t offset, std::mt19937& random, float scale)
      : ld(columns + padding) {
    const std::size_t bytes = static_cast<std::size_t>(offset + rows * ld - padding) * sizeof(E);
    void* place = nullptr;
    if (posix_memalign(&place, 16, bytes) != 0) std::abort();
    memory.reset(place);
    std::memset(place, 0xff, bytes);
    data = static_cast<E*>(place) + offset;
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
  if (!found.empty()) return name + none(found);
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

}  // namespace host
