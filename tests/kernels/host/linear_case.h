// One product of a gated linear layer on the twin, against float64: matrices in allocations of their exact size, with
// NaN in the padding and around, so that a tail that reads or writes too far shows.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "cuda/linear.cuh"

namespace host {

using namespace taps::dev;  // NOLINT
using taps::Dtype;
using taps::LinearProduct;
using taps::Product;

template <class E>
constexpr Dtype dtype_of() {
  return std::is_same_v<E, bf16> ? Dtype::kBFloat16 : std::is_same_v<E, f16> ? Dtype::kFloat16 : Dtype::kFloat32;
}

// A matrix whose padding and surroundings are NaN, in an allocation of exactly its size.
template <class E>
struct Filled {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t ld;
  E* data;
  Filled(int64_t rows, int64_t columns, int64_t padding, int64_t offset, std::mt19937& random, float scale)
      : ld(columns + padding) {
    const auto bytes = static_cast<std::size_t>(rows > 0 ? offset + rows * ld - padding : offset) * sizeof(E);
    void* place = nullptr;
    if (posix_memalign(&place, 16, bytes + (bytes == 0)) != 0) std::abort();
    memory.reset(place);
    std::memset(place, 0xff, bytes);
    data = static_cast<E*>(place) + offset;
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) data[r * ld + c] = from_f32<E>(normal(random));
    }
  }
  void round_to_whole(int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) data[r * ld + c] = from_f32<E>(std::round(2.0f * to_f32(data[r * ld + c])));
    }
  }
  double operator()(int64_t r, int64_t c) const { return to_f32(data[r * ld + c]); }
  taps::Matrix matrix() const { return {data, ld}; }
};

// How many have been checked so far.
inline int& problems() {
  static int count = 0;
  return count;
}

enum class Known { kClosed, kOpen, kRead, kReadDouble };  // how the gate is known

struct Problem {
  int64_t m, n, k;
  Known gate = Known::kOpen;
  double score = 0.2;  // where the device reads it; the threshold is 0.1
  int splits = 1;      // 0: as planned for `multiprocessors`
  bool bias = false;
  int64_t padding = 0, offset = 0;
  uint64_t seed = 0;
  int multiprocessors = 8;
  bool clusters = false;  // splits, where there are any, are the blocks of clusters
  int most_of_cluster() const { return clusters ? static_cast<int>(kMostOfCluster) : 0; }
  double scale = 1.0;
  bool result = true, dot = true;  // of the weight gradient
  bool exact = false;              // x and dy are small whole numbers: G is exact, and its product with Delta fp64's

  bool open() const {
    return gate == Known::kOpen || ((gate == Known::kRead || gate == Known::kReadDouble) && score >= 0.1);
  }
  std::string name() const {
    return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) + " gate " +
           std::to_string(static_cast<int>(gate)) + " splits " + std::to_string(splits);
  }
};

// A number as the tensor core takes it.
template <class T>
double operand(double x) {
  if constexpr (sizeof(T) == 4) return float_of(to_tf32(static_cast<float>(x)));
  return to_f32(from_f32<T>(static_cast<float>(x)));
}

// Half the spacing of T's numbers at 1.
template <class T>
constexpr double unit() {
  return std::is_same_v<T, bf16> ? 0x1p-8 : std::is_same_v<T, f16> ? 0x1p-11 : 0x1p-24;
}

// `count` fp32 additions are each off by at most 2^-24 of a sum of at most `size`; then one rounding to T, whose
// least subnormal is at most 2^-24.
template <class T>
double bound(int64_t count, double size, double want) {
  return static_cast<double>(count + 1) * 0x1p-24 * size + unit<T>() * std::fabs(want) + 0x1p-24;
}

template <class T, class W, class D>
struct Tensors {
  std::mt19937 random;
  Filled<T> x, dy, bias;
  Filled<W> weight;
  Filled<D> delta;
  float score;
  double wide_score;
  LinearProduct args;

  explicit Tensors(const Problem& s)
      : random(static_cast<unsigned>(s.m * 131071 + s.n * 8191 + s.k)),
        x(s.m, s.k, s.padding, s.offset, random, 1.0f),
        dy(s.m, s.n, s.padding, s.offset, random, 1.0f),
        bias(1, s.n, 0, 0, random, 1.0f),
        weight(s.n, s.k, s.padding, s.offset, random, 0.2f),
        delta(s.n, s.k, s.padding, s.offset, random, 0.2f),
        score(static_cast<float>(s.score)),
        wide_score(s.score) {
    if (s.exact) {
      for (Filled<T>* matrix : {&x, &dy}) matrix->round_to_whole(s.m, matrix == &x ? s.k : s.n);
    }
    args.rows = s.m, args.outputs = s.n, args.inputs = s.k;
    args.weight = weight.matrix();
    args.compute = dtype_of<T>(), args.weight_dtype = dtype_of<W>(), args.delta_dtype = dtype_of<D>();
    args.gate.open = s.gate == Known::kOpen;
    args.gate.threshold = 0.1;
    if (s.gate == Known::kRead) args.gate.score = &score;
    if (s.gate == Known::kReadDouble) args.gate.score = &wide_score, args.gate.score_dtype = Dtype::kFloat64;
    args.scale = s.scale;
  }

  // W_t as the tensor core takes it.
  double weight_t(const Problem& s, int64_t n, int64_t k) const {
    const auto own = static_cast<float>(weight(n, k));
    return operand<T>(s.open() ? own + static_cast<float>(delta(n, k)) : own);
  }
};

// Whether a body divides the depth among a block's warps, and not among blocks.
template <class Body>
constexpr bool kInSlices = false;
template <int kRows, class T, class W, class D>
constexpr bool kInSlices<Rows<kRows, T, W, D>> = true;

// The grid as it is planned, or with as many splits, or slices to the next power of two, as a problem wants.
template <class Body, class Args>
Grid grid_of(Product kind, const Problem& s, const Args& args, int64_t rows, int64_t columns) {
  using S = typename Body::Tile;
  Grid grid = plan(kind, args, {s.multiprocessors, s.most_of_cluster()});
  if constexpr (kInSlices<Body>) {
    unsigned slices = 1;
    while (slices < static_cast<unsigned>(s.splits)) slices *= 2;
    return s.splits > 0 ? plan_rows(args, slices) : grid;
  } else {
    const int64_t depth = kind == Product::kForward ? s.k : kind == Product::kInputGradient ? s.n : s.m;
    grid.tiles = static_cast<unsigned>((rows + S::kRows - 1) / S::kRows * ((columns + S::kColumns - 1) / S::kColumns));
    if (s.splits > 0) {
      grid.splits = static_cast<unsigned>(s.splits);
      grid.clustered = in_cluster(s.splits, {s.multiprocessors, s.most_of_cluster()});
      grid.depth_of_split = (depth + s.splits * S::kDepth - 1) / (s.splits * S::kDepth) * S::kDepth;
      grid.bytes = std::max<int64_t>(4 * s.splits * rows * columns, 8 * grid.tiles);
    }
    return grid;
  }
}

// Runs a product as linear.cu launches it.
template <class Body, class T, class Args>
std::vector<twin::Finding> launch(Product kind, const Problem& s, Args& args, std::vector<float>& memory) {
  using S = typename Body::Tile;
  const bool weight_gradient = kind == Product::kWeightGradient;
  const int64_t rows = weight_gradient ? s.n : s.m, columns = kind == Product::kForward ? s.n : s.k;
  const Grid grid = grid_of<Body>(kind, s, args, rows, columns);
  memory.assign(static_cast<std::size_t>(grid.bytes + 3) / 4, std::numeric_limits<float>::quiet_NaN());
  args.memory = memory.data();
  set_grid(args, grid);
  const twin::Dim blocks_of{grid.tiles, grid.splits};
  if constexpr (kHasCluster<Body>) {
    if (grid.clustered) {
      args.memory = nullptr;
      return twin::launch(blocks_of, S::kThreads, Body::Loop::kShared, [&] { Body::run_in_cluster(args); }, s.seed,
                          {1, grid.splits});
    }
  }
  auto found = twin::launch(blocks_of, S::kThreads, Body::Loop::kShared, [&] { Body::run(args); }, s.seed);
  if (!weight_gradient && args.splits > 1 && found.empty()) {
    const auto blocks = static_cast<unsigned>((rows * columns + 63) / 64);
    found = twin::launch({blocks, 1, 1}, 64, 0, [&] { add_splits<T>(args, rows, columns); }, s.seed);
  }
  return found;
}

inline std::string differs(const Problem& s, int64_t r, int64_t c, double want, double got) {
  return s.name() + " at (" + std::to_string(r) + ", " + std::to_string(c) + "): expected " + std::to_string(want) +
         ", got " + std::to_string(got);
}

// y = x W_t^T + bias, or dx = dy W_t.
template <class Body, class T, class W, class D>
std::string check(Product kind, const Problem& s) {
  const bool forward = kind == Product::kForward;
  Tensors<T, W, D> t(s);
  const int64_t columns = forward ? s.n : s.k, depth = forward ? s.k : s.n;
  Filled<T> out(s.m, columns, s.padding, s.offset, t.random, 0.0f);
  if (s.gate != Known::kClosed) t.args.delta = t.delta.matrix();  // a closed gate may not look at it
  if (forward && s.bias) t.args.bias = t.bias.data;
  (forward ? t.args.x : t.args.dy) = forward ? t.x.matrix() : t.dy.matrix();
  t.args.result = out.data, t.args.ld_result = out.ld;
  std::vector<float> memory;
  const auto found = launch<Body, T>(kind, s, t.args, memory);
  if (!found.empty()) return s.name() + none(found);
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      double want = forward && s.bias ? t.bias(0, c) : 0.0, size = std::fabs(want);
      for (int64_t i = 0; i < depth; ++i) {
        const double product =
            forward ? operand<T>(t.x(r, i)) * t.weight_t(s, c, i) : operand<T>(t.dy(r, i)) * t.weight_t(s, i, c);
        want += product;
        size += std::fabs(product);
      }
      if (!(std::fabs(out(r, c) - want) <= bound<T>(depth + t.args.splits, size, want)))
        return differs(s, r, c, want, out(r, c));
    }
  }
  return "";
}

// A product whose depth is split in clusters and by the second kernel: the same to the bit.
template <class Body, class T, class W, class D>
std::string check_clusters(Product kind, Problem s) {
  const bool forward = kind == Product::kForward;
  Tensors<T, W, D> t(s);
  const int64_t columns = forward ? s.n : s.k;
  Filled<T> out[2] = {{s.m, columns, s.padding, s.offset, t.random, 0.0f},
                      {s.m, columns, s.padding, s.offset, t.random, 0.0f}};
  t.args.delta = t.delta.matrix();
  if (forward && s.bias) t.args.bias = t.bias.data;
  (forward ? t.args.x : t.args.dy) = forward ? t.x.matrix() : t.dy.matrix();
  for (const bool clusters : {false, true}) {
    s.clusters = clusters;
    t.args.result = out[clusters].data, t.args.ld_result = out[clusters].ld;
    std::vector<float> memory;
    const auto found = launch<Body, T>(kind, s, t.args, memory);
    if (!found.empty()) return s.name() + none(found);
    if ((t.args.memory == nullptr) != clusters) return s.name() + ": expected clusters";
  }
  for (int64_t r = 0; r < s.m; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      if (std::memcmp(out[0].data + r * out[0].ld + c, out[1].data + r * out[1].ld + c, sizeof(T)) != 0)
        return "clusters: " + differs(s, r, c, out[0](r, c), out[1](r, c));
    }
  }
  return "";
}

// g * scale * G and <G, Delta> of G = dy^T x.
template <class Body, class T, class D>
std::string check_weight(const Problem& s) {
  Tensors<T, T, D> t(s);
  Filled<D> out(s.n, s.k, s.padding, s.offset, t.random, 0.0f);
  double dot = 0.0;
  t.args.x = t.x.matrix(), t.args.dy = t.dy.matrix();
  if (s.dot) t.args.delta = t.delta.matrix(), t.args.score_gradient = &dot;
  if (s.result) t.args.result = out.data, t.args.ld_result = out.ld;
  std::vector<float> memory;
  const auto found = launch<Body, T>(Product::kWeightGradient, s, t.args, memory);
  if (!found.empty()) return s.name() + none(found);
  double want_dot = 0.0, bound_dot = 0.0;
  for (int64_t r = 0; r < s.n; ++r) {
    for (int64_t c = 0; c < s.k; ++c) {
      double g = 0.0, size = 0.0;
      for (int64_t i = 0; i < s.m; ++i) {
        const double product = operand<T>(t.dy(i, r)) * operand<T>(t.x(i, c));
        g += product;
        size += std::fabs(product);
      }
      want_dot += g * t.delta(r, c);
      // Of exact products, that one and a sum of all: half a unit each, here and there.
      const double ulps = static_cast<double>(2 * s.n * s.k + 2) * 0x1p-53;
      bound_dot += (s.exact ? ulps * std::fabs(g) : bound<float>(s.m, size, g)) * std::fabs(t.delta(r, c));
      if (!s.result) continue;
      const double want = s.open() ? s.scale * g : 0.0;
      const double allowed = s.scale * bound<D>(s.m + 1, size, g);  // and one product with the scale
      if (!(std::fabs(out(r, c) - want) <= allowed)) return differs(s, r, c, want, out(r, c));
    }
  }
  if (!s.dot) return "";
  const double* const sums = reinterpret_cast<const double*>(memory.data());
  const auto tiles =
      (s.n + Body::Tile::kRows - 1) / Body::Tile::kRows * ((s.k + Body::Tile::kColumns - 1) / Body::Tile::kColumns);
  double got = 0.0;
  for (int64_t i = 0; i < tiles; ++i) got += sums[i];
  return std::fabs(got - want_dot) <= bound_dot ? "" : differs(s, -1, -1, want_dot, got);
}

// Sums over the splits, first to last: to the bit, of numbers that do not add up alike in another order.
inline std::string check_splits() {
  constexpr int64_t kRows = 5, kColumns = 7, kSplits = 4;
  std::mt19937 random(3);
  Filled<float> partial(kSplits, kRows * kColumns, 0, 0, random, 1.0f), out(kRows, kColumns, 0, 0, random, 1.0f);
  Filled<float> bias(1, kColumns, 0, 0, random, 1.0f);
  LinearProduct args;
  args.memory = partial.data, args.splits = kSplits, args.bias = bias.data;
  args.result = out.data, args.ld_result = kColumns;
  const auto found = twin::launch({1}, 64, 0, [&] { add_splits<float>(args, kRows, kColumns); });
  if (!found.empty()) return none(found);
  for (int64_t i = 0; i < kRows * kColumns; ++i) {
    float want = 0.0f;
    for (int64_t split = 0; split < kSplits; ++split) want += partial.data[split * kRows * kColumns + i];
    want += bias.data[i % kColumns];
    if (want != out.data[i]) return "expected " + std::to_string(want) + ", got " + std::to_string(out.data[i]);
  }
  return "";
}

}  // namespace host
