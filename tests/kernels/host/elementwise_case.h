// One rebuild, many, or a dot product on the twin, against plain loops: operands in allocations of their exact size.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "check.h"
#include "cuda/dot.cuh"
#include "cuda/reconstruct.cuh"
#include "cuda/settle.cuh"

namespace host {

using namespace taps::dev;  // NOLINT
using taps::Dot;
using taps::Dtype;
using taps::flat_walk;
using taps::ForeachReconstruct;
using taps::ForeachSettle;
using taps::Rebuild;
using taps::Reconstruct;
using taps::Settle;

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

// `count` elements from an element `offset` on, in an allocation that begins on 16 bytes and ends with them.
struct Array {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
  Dtype dtype;
  int64_t count;
  char* data;

  Array(Dtype dtype, int64_t count, int64_t offset = 0) : dtype(dtype), count(count) {
    const auto bytes = static_cast<std::size_t>((offset + count) * size_of(dtype));
    void* place = nullptr;
    if (posix_memalign(&place, 16, bytes + (bytes == 0)) != 0) std::abort();
    memory.reset(place);
    std::memset(place, 0xff, bytes);  // NaN
    data = static_cast<char*>(place) + offset * size_of(dtype);
  }
  Array& draw(std::mt19937& random) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) store_one(data, dtype, i, normal(random));
    return *this;
  }
  double operator[](int64_t i) const { return load_one<double>(data, dtype, i); }
  bool same(int64_t i, double value) const {  // to the bit
    Array one(dtype, 1);
    store_one(one.data, dtype, 0, value);
    return std::memcmp(one.data, data + i * size_of(dtype), static_cast<std::size_t>(size_of(dtype))) == 0;
  }
};

// A sum as the kernels make it: in fp32 unless an operand is fp64, then rounded to the result's type. The sum of two
// floats in fp64 loses nothing that its rounding to fp32 would keep.
inline double rebuilt(const Rebuild& args, double weight, double delta, bool open) {
  const double sum = args.weight ? (open ? weight + delta : weight) : (open ? delta : 0.0);
  if (args.in_double()) return sum * args.scale;
  const auto rounded = static_cast<float>(sum);
  return args.scale == 1.0 ? rounded : rounded * static_cast<float>(args.scale);
}

enum class How { kClosed, kOpen, kReadClosed, kReadOpen };  // the gate

struct Elements {
  std::mt19937 random{5};
  Array out, weight, delta;
  float score;
  Rebuild args;
  bool open;

  Elements(Dtype out_dtype, Dtype weight_dtype, Dtype delta_dtype, int64_t count, int64_t offset, How how)
      : out(out_dtype, count, offset),
        weight(weight_dtype, count, offset),
        delta(delta_dtype, count, offset),
        score(how == How::kReadOpen ? 0.2f : 0.05f),
        open(how == How::kOpen || how == How::kReadOpen) {
    weight.draw(random);
    if (open) delta.draw(random);  // else NaN, which must not be seen
    args.out = out.data, args.weight = weight.data, args.delta = how == How::kClosed ? nullptr : delta.data;
    args.out_dtype = out_dtype, args.weight_dtype = weight_dtype, args.delta_dtype = delta_dtype;
    args.gate.open = how == How::kOpen;
    args.gate.threshold = 0.1;
    if (how == How::kReadClosed || how == How::kReadOpen) args.gate.score = &score;
  }
  std::string differs() const {
    for (int64_t i = 0; i < out.count; ++i) {
      if (!out.same(i, rebuilt(args, weight[i], open ? delta[i] : 0.0, open)))
        return "expected " + std::to_string(rebuilt(args, weight[i], open ? delta[i] : 0.0, open)) + " at " +
               std::to_string(i) + " of " + std::to_string(out.count) + ", got " + std::to_string(out[i]);
    }
    return "";
  }
};

// Runs a walk as reconstruct.cu launches it.
inline std::string run(const Reconstruct& args, uint64_t seed = 0, int multiprocessors = 1) {
  return none(twin::launch(
      {reconstruct_blocks(args, multiprocessors)}, kThreads, 0,
      [&] {
        if (!args.walk.flat()) {
          args.in_double() ? reconstruct_strided<double>(args) : reconstruct_strided<float>(args);
        } else if (args.in_double()) {
          reconstruct_flat<double>(args, takes_vectors(args));
        } else {
          reconstruct_flat<float>(args, takes_vectors(args));
        }
      },
      seed));
}

inline std::string check_flat(Dtype out, Dtype weight, Dtype delta, int64_t count, int64_t offset, How how,
                              double scale = 1.0, bool select = false) {
  Elements e(out, weight, delta, count, offset, how);
  e.args.scale = scale;
  if (select) e.args.weight = nullptr;
  Reconstruct args;
  static_cast<Rebuild&>(args) = e.args;
  args.walk = flat_walk<3>(count);
  std::string wrong = run(args, static_cast<uint64_t>(count % 3));
  return wrong.empty() ? e.differs() : wrong;
}

// Three operands of one shape [rows, columns, places], of which each row is followed by a gap of its own and, as in
// channels_last, the weight's columns lie inside its places. With `select` there is no weight.
inline std::string check_strided(Dtype dtype, int64_t rows, int64_t columns, int64_t places, How how,
                                 bool select = false) {
  Reconstruct args;
  const int64_t gaps[] = {0, 3, 1};
  int64_t strides[3][3];
  args.walk.ndim = 3, args.walk.numel = rows * columns * places;
  args.walk.sizes[0] = rows, args.walk.sizes[1] = columns, args.walk.sizes[2] = places;
  for (int k = 0; k < 3; ++k) {
    strides[k][0] = columns * places + gaps[k], strides[k][1] = k == 1 ? 1 : places,
    strides[k][2] = k == 1 ? columns : 1;
    for (int dim = 0; dim < 3; ++dim) args.walk.strides[k][dim] = strides[k][dim];
  }
  const auto extent = [&](int k) { return (rows - 1) * strides[k][0] + columns * places; };
  std::mt19937 random(3);
  Array out(Dtype::kBFloat16, extent(0)), weight(dtype, extent(1)), delta(Dtype::kFloat32, extent(2));
  weight.draw(random), delta.draw(random);
  const bool open = how == How::kOpen || how == How::kReadOpen;
  const double score = open ? 0.2 : 0.05;
  args.out = out.data, args.weight = select ? nullptr : weight.data, args.delta = delta.data;
  args.out_dtype = out.dtype, args.weight_dtype = dtype, args.delta_dtype = delta.dtype;
  args.gate.open = how == How::kOpen, args.gate.threshold = 0.1;
  if (how == How::kReadClosed || how == How::kReadOpen)
    args.gate.score = &score, args.gate.score_dtype = Dtype::kFloat64;
  if (std::string wrong = run(args, 1); !wrong.empty()) return wrong;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t p = 0; p < places; ++p) {
        const auto at = [&](int k) { return r * strides[k][0] + c * strides[k][1] + p * strides[k][2]; };
        if (!out.same(at(0), rebuilt(args, weight[at(1)], delta[at(2)], open)))
          return "expected W_t, got another value";
      }
    }
  }
  return "";
}

// Items of the given sizes, types and offsets in turn.
inline std::string check_foreach(const std::vector<int64_t>& counts, bool in_double, uint64_t seed) {
  std::vector<std::unique_ptr<Elements>> items;
  ForeachReconstruct batch;
  for (const int64_t count : counts) {
    const std::size_t i = items.size();
    const Dtype kind = in_double ? Dtype::kFloat64 : kDtypes[i % 3 == 0 ? 0 : i % 3 + 1];
    items.push_back(std::make_unique<Elements>(kind, kDtypes[i % 2 * 2], Dtype::kFloat32, count,
                                               static_cast<int64_t>(i % 4 == 3), static_cast<How>(i % 4)));
    batch.items[batch.count] = items.back()->args;
    batch.numel[batch.count++] = count;
  }
  const unsigned blocks = plan_foreach(batch);
  std::string wrong = none(twin::launch(
      {blocks}, kThreads, 0,
      [&] { in_double ? foreach_reconstruct<double>(batch) : foreach_reconstruct<float>(batch); }, seed));
  for (std::size_t i = 0; i < items.size() && wrong.empty(); ++i) {
    wrong = items[i]->differs();
    if (!wrong.empty()) wrong += " (item " + std::to_string(i) + ")";
  }
  return wrong;
}

// `rows` of `columns` elements; with a gap the walk is strided. Twice, in two orders of the threads: the same bits.
inline std::string check_dot(Dtype first, Dtype second, int64_t rows, int64_t columns, int64_t gap, int64_t offset) {
  std::mt19937 random(11);
  const int64_t extent = rows > 0 ? (rows - 1) * (columns + gap) + columns : 0;
  Array a(first, extent, offset), b(second, rows * columns, offset);
  a.draw(random), b.draw(random);
  Dot args;
  args.walk = flat_walk<2>(rows * columns);
  if (gap > 0) {
    args.walk.ndim = 2, args.walk.sizes[0] = rows, args.walk.sizes[1] = columns;
    args.walk.strides[0][0] = columns + gap, args.walk.strides[1][0] = columns;
    args.walk.strides[0][1] = args.walk.strides[1][1] = 1;
  }
  double result = std::numeric_limits<double>::quiet_NaN();
  args.a = a.data, args.b = b.data, args.a_dtype = first, args.b_dtype = second, args.scale = 2.5;
  args.result = &result, args.result_dtype = Dtype::kFloat64;
  const int64_t chunks = dot_chunks(args.walk);
  const bool in_double = first == Dtype::kFloat64 || second == Dtype::kFloat64;
  const bool vectors = aligned(args.a) && aligned(args.b);
  double earlier = 0.0;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    std::vector<double> partials(static_cast<std::size_t>(chunks), std::numeric_limits<double>::quiet_NaN());
    args.partials = partials.data();
    std::string wrong;
    if (chunks > 0) {
      wrong = none(twin::launch(
          {static_cast<unsigned>(chunks)}, kThreads, kDotShared,
          [&] {
            if (!args.walk.flat()) {
              dot_strided(args, (args.walk.numel + chunks - 1) / chunks);
            } else if (in_double) {
              dot_flat<double>(args, vectors);
            } else {
              dot_flat<float>(args, vectors);
            }
          },
          seed));
    }
    if (wrong.empty()) {
      wrong = none(twin::launch(
          {1}, kThreads, kDotShared,
          [&] { dot_finish(args.partials, chunks, args.scale, args.result, args.result_dtype); }, seed));
    }
    if (!wrong.empty()) return wrong;
    if (seed > 0 && std::memcmp(&earlier, &result, 8) != 0) return "expected the same bits in another order";
    earlier = result;
  }
  double want = 0.0, size = 0.0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double product = a[i / columns * (columns + gap) + i % columns] * b[i];
    want += product;
    size += std::fabs(product);
  }
  // Every product, addition and the scale err by at most half a unit of what has been summed, here and there.
  const double bound = 2.5 * size * static_cast<double>(2 * rows * columns + 2) * 0x1p-53;
  if (std::fabs(result - 2.5 * want) <= bound) return "";
  return "expected " + std::to_string(2.5 * want) + ", got " + std::to_string(result);
}

// One of many that are settled: G and Delta of these types, what is asked for, the gate.
struct Settled {
  std::mt19937 random;
  Array gradient, delta, delta_gradient;
  std::vector<double> before;  // G, which may be written over
  double score_gradient = std::numeric_limits<double>::quiet_NaN();
  float narrow_gradient = std::numeric_limits<float>::quiet_NaN();
  float score;
  Settle args;
  bool open, in_place, narrow;

  Settled(Dtype gradient_dtype, Dtype delta_dtype, int64_t count, int64_t offset, How how, bool want_delta,
          bool want_score, bool in_place, bool narrow)
      : random(static_cast<unsigned>(count + offset)),
        gradient(gradient_dtype, count, offset),
        delta(delta_dtype, count, offset),
        delta_gradient(delta_dtype, count, count % 4 == 1 ? 1 - offset : offset),
        score(how == How::kReadOpen ? 0.2f : 0.05f),
        open(how == How::kOpen || how == How::kReadOpen),
        in_place(in_place),
        narrow(narrow) {
    if (open || want_score) gradient.draw(random);  // else NaN, which must not be seen
    if (want_score) delta.draw(random), args.delta = delta.data;
    for (int64_t i = 0; i < count; ++i) before.push_back(gradient[i]);
    args.gradient = gradient.data, args.gradient_dtype = gradient_dtype, args.delta_dtype = delta_dtype;
    if (want_delta) args.delta_gradient = in_place ? gradient.data : delta_gradient.data;
    if (want_score) args.score_gradient = narrow ? static_cast<void*>(&narrow_gradient) : &score_gradient;
    args.score_dtype = narrow ? Dtype::kFloat32 : Dtype::kFloat64;
    args.gate.open = how == How::kOpen, args.gate.threshold = 0.1;
    if (how == How::kReadClosed || how == How::kReadOpen) args.gate.score = &score;
    for (int64_t inner = 9; inner > 1 && !in_place && count % 2 == 1; --inner) {  // G as with channels last
      if (count % inner == 0)
        args.inner = static_cast<uint32_t>(inner), args.outer = static_cast<uint32_t>(count / inner);
      for (uint32_t rows = 2; rows < 9 && args.outer > 1; ++rows) {
        if (args.outer % rows == 0) args.outer /= rows;
      }
      if (args.outer > 0) break;
    }
  }

  double gradient_of(int64_t i) const {
    if (args.outer == 0) return before[static_cast<std::size_t>(i)];
    const int64_t row = static_cast<int64_t>(args.outer) * args.inner;
    const int64_t o = i / row, a = i % row / args.inner, b = i % args.inner;
    return before[static_cast<std::size_t>(o * row + b * args.outer + a)];
  }

  std::string differs() const {
    const Array& result = in_place ? gradient : delta_gradient;
    double want = 0.0, size = 0.0;
    for (int64_t i = 0; i < gradient.count; ++i) {
      const double g = gradient_of(i);
      // A G that is wider than fp32 narrows to 16 bits through fp32, as everywhere.
      if (args.delta_gradient && !result.same(i, open ? g : 0.0))
        return "expected g * G, got " + std::to_string(result[i]);
      if (args.score_gradient) want += g * delta[i], size += std::fabs(g * delta[i]);
    }
    if (!args.score_gradient) return "";
    const double got = narrow ? narrow_gradient : score_gradient;
    // Products and sums err as in check_dot; a score in fp32 is rounded once more.
    const double bound =
        size * static_cast<double>(2 * gradient.count + 2) * 0x1p-53 + (narrow ? std::fabs(want) * 0x1p-24 : 0.0);
    return std::fabs(got - want) <= bound ? "" : "expected " + std::to_string(want) + ", got " + std::to_string(got);
  }
};

// Items of the given sizes; types, offsets, gates and what is asked for in turn.
inline std::string check_settle(const std::vector<int64_t>& counts, bool in_double, uint64_t seed) {
  std::vector<std::unique_ptr<Settled>> items;
  ForeachSettle batch;
  for (const int64_t count : counts) {
    const std::size_t i = items.size() + seed;
    const Dtype delta = in_double ? Dtype::kFloat64 : kDtypes[i % 3 == 0 ? 0 : i % 3 + 1];
    const bool in_place = i % 5 == 2;
    const Dtype gradient = in_place ? delta : kDtypes[i % 4 == 1 && !in_double ? 0 : i % 4];
    items.push_back(std::make_unique<Settled>(gradient, delta, count, static_cast<int64_t>(i % 7 == 3),
                                              static_cast<How>(i % 4), i % 6 != 1, i % 5 != 3, in_place, i % 2 == 0));
    batch.items[batch.count] = items.back()->args;
    batch.numel[batch.count++] = count;
  }
  const unsigned blocks = plan_foreach(batch);
  std::vector<double> partials(blocks, std::numeric_limits<double>::quiet_NaN());
  if (static_cast<int64_t>(blocks) != batch.chunks()) return "expected a block to a chunk";
  batch.partials = partials.data();
  std::string wrong = none(twin::launch(
      {blocks}, kThreads, kDotShared, [&] { in_double ? foreach_settle<double>(batch) : foreach_settle<float>(batch); },
      seed));
  if (wrong.empty())
    wrong = none(
        twin::launch({static_cast<unsigned>(batch.count)}, kThreads, kDotShared, [&] { foreach_finish(batch); }, seed));
  for (std::size_t i = 0; i < items.size() && wrong.empty(); ++i) {
    wrong = items[i]->differs();
    if (!wrong.empty()) wrong += " (item " + std::to_string(i) + ")";
  }
  return wrong;
}

// A score is compared in its own precision, as torch does: 0.7 rounded to fp32 is less than 0.7, and open. NaN is
// closed.
inline std::string check_gates() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& [score, threshold] : {std::pair<double, double>{0.1, 0.1},
                                         {0.7, 0.7},
                                         {std::nextafter(0.7, 0.0), 0.7},
                                         {0.2, 0.1},
                                         {0.05, 0.1},
                                         {nan, 0.1},
                                         {0.1, nan}}) {
    const auto narrow = static_cast<float>(score), narrow_threshold = static_cast<float>(threshold);
    taps::Gate gate;
    gate.threshold = threshold;
    gate.score = &score, gate.score_dtype = Dtype::kFloat64;
    const bool wide_open = score > threshold || score == threshold;
    if (is_open(gate) != wide_open) return "expected another gate of " + std::to_string(score) + ", got it in fp64";
    gate.score = &narrow, gate.score_dtype = Dtype::kFloat32;
    const bool open = narrow > narrow_threshold || narrow == narrow_threshold;
    if (is_open(gate) != open) return "expected another gate of " + std::to_string(score) + ", got it in fp32";
  }
  return "";
}

}  // namespace host
