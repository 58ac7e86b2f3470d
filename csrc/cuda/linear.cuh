// The three products of a gated linear layer as tile kernels, and how each is laid out over a grid. One definition for
// nvcc and for the twin; the launches are in linear.cu.
#pragma once

#include <algorithm>

#include "cuda/gate.cuh"
#include "cuda/rows.cuh"
#include "cuda/tile.cuh"

namespace taps::dev {

// Which part of the result a block computes. Tiles of rows go fastest, so that blocks that run together share W.
template <class S>
struct Place {
  int64_t row, column;
  TAPS_DEVICE explicit Place(int64_t rows) {
    const unsigned down = static_cast<unsigned>((rows + S::kRows - 1) / S::kRows);
    row = static_cast<int64_t>(bid_x() % down) * S::kRows;
    column = static_cast<int64_t>(bid_x() / down) * S::kColumns;
  }
};

// Elements between rows of a tile's sums in shared memory. A warp writes pairs of eight rows together. Where nvcc
// stores a pair as one word of 8 bytes no two are in the same banks; where it stores two of 4 bytes, two rows share
// each bank.
template <class S>
constexpr unsigned stride_of_sums = S::kColumns + 8;

// The sums of a tile whose splits are the blocks of a cluster: each leaves its own in its shared memory, then adds
// those of its share of the rows, first split to last, and the bias, as add_splits does.
template <class S, class T>
TAPS_DEVICE void add_in_cluster(const float (&sum)[S::kM][S::kN][4], const LinearProduct& p, const Place<S>& place,
                                int64_t rows, int64_t columns) {
  constexpr unsigned kStride = stride_of_sums<S>, kFours = S::kColumns / 4, kAtOnce = 4;
  const sh<float> sums = as<float>(arena(), 0);
  block_sync();  // the stages are not read any more
  if (S::slice() == 0) {
    for_pairs<S>(sum, [&](unsigned i, unsigned j, unsigned, float first, float second) {
      st(sums, i * kStride + j, first);
      st(sums, i * kStride + j + 1, second);
    });
  }
  cluster_sync();  // all sums are there
  const unsigned blocks = cluster_blocks();
  const int64_t below = rows - place.row;
  const unsigned last = below < S::kRows ? static_cast<unsigned>(below) : S::kRows;
  T* const result = static_cast<T*>(p.result);
  const T* const bias = static_cast<const T*>(p.bias);
  for (unsigned at = tid();; at += S::kThreads) {
    const unsigned i = at / kFours * blocks + cluster_rank(), j = at % kFours * 4;
    if (i >= last) break;
    float total[4] = {};
    for (unsigned rank = 0; rank < blocks; rank += kAtOnce) {
      Vec16 part[kAtOnce];  // all before any is added: they wait together
#pragma unroll
      for (unsigned k = 0; k < kAtOnce; ++k) {
        part[k] = ld16_of(rank + k < blocks ? rank + k : cluster_rank(), sums, i * kStride + j);
      }
#pragma unroll
      for (unsigned k = 0; k < kAtOnce; ++k) {
        for (int e = 0; e < 4; ++e) {
          total[e] = rank + k < blocks ? total[e] + float_of(part[k].word[e]) : total[e];
        }
      }
    }
    for (int e = 0; e < 4; ++e) {
      const int64_t r = place.row + i, c = place.column + j + e;
      if (c < columns) result[r * p.ld_result + c] = from_f32<T>(bias ? total[e] + to_f32(bias[c]) : total[e]);
    }
  }
  warp_sync();     // the barrier is for whole warps, whose threads have left the loop at different times
  cluster_sync();  // no block ends while its sums are read
}

// Sums of a split of the depth go to `memory` as [splits, rows, columns] in fp32; a second kernel adds them.
template <class S, class T>
TAPS_DEVICE void write(const float (&sum)[S::kM][S::kN][4], const LinearProduct& p, const Place<S>& place, int64_t rows,
                       int64_t columns) {
  if (S::slice() != 0) return;
  T* const result = static_cast<T*>(p.result);
  const T* const bias = static_cast<const T*>(p.bias);
  float* const partial = static_cast<float*>(p.memory) + bid_y() * rows * columns;
  for_pairs<S>(sum, [&](unsigned i, unsigned j, unsigned, float first, float second) {
    const int64_t r = place.row + i, c = place.column + j;
    if (r >= rows) return;
    for (int e = 0; e < 2; ++e) {
      if (c + e >= columns) return;
      const float value = e == 0 ? first : second;
      if (p.splits > 1) {
        partial[r * columns + c + e] = value;
      } else {
        result[r * p.ld_result + c + e] = from_f32<T>(bias ? value + to_f32(bias[c + e]) : value);
      }
    }
  });
}

// The sum over the splits, first to last, and the bias: one thread for each element of the result.
template <class T>
TAPS_DEVICE void add_splits(const LinearProduct& p, int64_t rows, int64_t columns) {
  const int64_t at = static_cast<int64_t>(bid_x()) * nthreads() + tid();
  if (at >= rows * columns) return;
  const float* const partial = static_cast<const float*>(p.memory);
  float sum = 0.0f;
  for (int split = 0; split < p.splits; ++split) sum += partial[split * rows * columns + at];
  const int64_t c = at % columns;
  if (p.bias) sum += to_f32(static_cast<const T*>(p.bias)[c]);
  static_cast<T*>(p.result)[at / columns * p.ld_result + c] = from_f32<T>(sum);
}

// Any left operand times W_t^T, or with kTurned times W_t: this block's part of the depth, and what leaves.
template <class S, class T, class W, class D, class A, bool kTurned>
struct TimesWeight {
  using Tile = S;
  template <bool kOpen>
  using B = Gated<S, T, W, D, kTurned, kOpen>;
  using Loop = Ring<S, T, A, B<true>>;
  using Closed = Ring<S, T, A, B<false>>;
  static_assert(Closed::kShared <= Loop::kShared, "a block has what the open loop needs");
  static_assert(4 * S::kRows * stride_of_sums<S> <= Loop::kShared, "room for a tile's sums");

  template <bool kInCluster>
  static TAPS_DEVICE void run(const LinearProduct& p, const A& left, const Place<S>& place, int64_t columns,
                              int64_t depth) {
    const int64_t begin = bid_y() * p.depth_of_split, end = begin + p.depth_of_split;
    const int64_t last = end < depth ? end : depth;
    float sum[S::kM][S::kN][4] = {};
    if (is_open(p.gate)) {  // asked once: inside the loop every register of B would ask
      Loop::multiply(sum, left, B<true>(p.weight, p.delta, place.column, columns), begin, last);
    } else {
      Closed::multiply(sum, left, B<false>(p.weight, p.delta, place.column, columns), begin, last);
    }
    if constexpr (kInCluster) {
      add_in_cluster<S, T>(sum, p, place, p.rows, columns);
    } else {
      write<S, T>(sum, p, place, p.rows, columns);
    }
  }
};

// y = x W_t^T + bias, or with kBackward dx = dy W_t. Where a cluster adds the splits it is another kernel: with both
// ways out of one, ptxas makes the loop longer for all.
template <class S, class T, class W, class D, bool kBackward>
struct Activation : TimesWeight<S, T, W, D, Straight<S, T>, kBackward> {
  static TAPS_DEVICE void run(const LinearProduct& p) { start<false>(p); }
  static TAPS_DEVICE void run_in_cluster(const LinearProduct& p) { start<true>(p); }

 private:
  template <bool kInCluster>
  static TAPS_DEVICE void start(const LinearProduct& p) {
    const int64_t columns = kBackward ? p.inputs : p.outputs, depth = kBackward ? p.outputs : p.inputs;
    const Place<S> place(p.rows);
    const Straight<S, T> left(kBackward ? p.dy : p.x, place.row, p.rows);
    TimesWeight<S, T, W, D, Straight<S, T>, kBackward>::template run<kInCluster>(p, left, place, columns, depth);
  }
};

// Whether a body's splits may be the blocks of a cluster. Those of convolutions may not: what is fused of them is
// shallow (core/choose.h), and keeps the second kernel. One whose pixels are the rows of a linear layer (1 x 1, stride
// 1) is that layer's product, here and in clusters.
template <class Body>
constexpr bool kHasCluster = false;
template <class S, class T, class W, class D, bool kBackward>
constexpr bool kHasCluster<Activation<S, T, W, D, kBackward>> = true;

template <class S, class T, class W, class D>
using Forward = Activation<S, T, W, D, false>;
template <class S, class T, class W, class D>
using InputGradient = Activation<S, T, W, D, true>;

// G = dy^T x, which stays in registers: g * scale * G and <G, Delta> leave. The product with Delta is summed in fp64: a
// thread's elements in turn, then its warp's threads pairwise, then the warps in turn; one sum a block, to `memory`.
template <class S, class T, class D>
struct WeightGradient {
  using Tile = S;
  using A = Turned<S, T>;
  using B = Plain<S, T>;
  using Loop = Ring<S, T, A, B>;
  static_assert(S::kSlices == 1 && Loop::kShared >= 8 * S::kThreads / 32, "room for a sum of each warp");

  static TAPS_DEVICE void run(const LinearProduct& p) {
    const Place<S> place(p.outputs);
    const bool open = is_open(p.gate);
    float sum[S::kM][S::kN][4] = {};
    Loop::multiply(sum, A(p.dy, place.row, p.outputs), B(p.x, place.column, p.inputs), 0, p.rows);
    settle(sum, p, place, open, bid_x());
  }

  // What leaves of a block's part of G; its sum goes to number `at` of those in `memory`.
  static TAPS_DEVICE void settle(const float (&sum)[S::kM][S::kN][4], const LinearProduct& p, const Place<S>& place,
                                 bool open, int64_t at) {
    const bool even = View<D>(p.delta).even() && View<D>({p.result, p.ld_result}).even();
    const bool whole = even && place.row + S::kRows <= p.outputs && place.column + S::kColumns <= p.inputs;
    double dot = whole ? leave<true>(sum, p, place, open) : leave<false>(sum, p, place, open);
    if (!p.score_gradient) return;
    for (int mask = 16; mask > 0; mask /= 2) dot += shfl_xor(dot, mask);
    const sh<double> sums = as<double>(arena(), 0);
    block_sync();  // the stages have been read
    if (lane() == 0) st(sums, warp(), dot);
    block_sync();
    if (tid() != 0) return;
    double total = 0.0;
    for (unsigned i = 0; i < S::kThreads / 32; ++i) total += ld(sums, i);
    static_cast<double*>(p.memory)[at] = total;
  }

 private:
  // Writes g * scale * G and returns this thread's part of <G, Delta>. All of Delta is read before any of it is needed,
  // so that the loads wait for memory together; tiles inside the matrix read and write pairs.
  template <bool kWhole>
  static TAPS_DEVICE double leave(const float (&sum)[S::kM][S::kN][4], const LinearProduct& p, const Place<S>& place,
                                  bool open) {
    const View<D> delta(p.delta);
    Two<D> change[S::kM * S::kN * 2] = {};
    if (p.score_gradient) {
      for_pairs<S>(sum, [&](unsigned i, unsigned j, unsigned at, float, float) {
        const int64_t r = place.row + i, c = place.column + j;
        const D* const from = delta.data + r * delta.ld + c;
        if constexpr (kWhole) {
          change[at] = *reinterpret_cast<const Two<D>*>(from);
        } else {
          if (r < p.outputs && c < p.inputs) change[at].x = from[0];
          if (r < p.outputs && c + 1 < p.inputs) change[at].y = from[1];
        }
      });
    }
    double dot = 0.0;
    for_pairs<S>(sum, [&](unsigned, unsigned, unsigned at, float first, float second) {
      dot += static_cast<double>(first) * to_f32(change[at].x);
      dot += static_cast<double>(second) * to_f32(change[at].y);
    });
    if (!p.result) return dot;
    const float scale = static_cast<float>(p.scale);
    for_pairs<S>(sum, [&](unsigned i, unsigned j, unsigned, float first, float second) {
      const int64_t r = place.row + i, c = place.column + j;
      D* const to = static_cast<D*>(p.result) + r * p.ld_result + c;
      const Two<D> value{from_f32<D>(open ? scale * first : 0.0f), from_f32<D>(open ? scale * second : 0.0f)};
      if constexpr (kWhole) {
        *reinterpret_cast<Two<D>*>(to) = value;
      } else {
        if (r < p.outputs && c < p.inputs) to[0] = value.x;
        if (r < p.outputs && c + 1 < p.inputs) to[1] = value.y;
      }
    });
    return dot;
  }
};

// --- grids, on the host --------------------------------------------------------------------------------------------

// Few rows: all of them in one tile, W and Delta streamed past; 32 columns, because 4096 of them then make 128 blocks.
using FewRows = Shape<16, 32, 64, 1, 4, 6, 2>;
using MoreRows = Shape<64, 64, 32, 2, 2, 4, 2>;
using WeightTile = Shape<64, 64, 32, 2, 2, 4>;
// Of the forward where layers are wide: x comes from L2 again for every 128 columns, not for every 64. Each warp has
// all rows of its columns, so that W_t is added up once. Of Delta in fp32 stages are half as deep: three or four of
// them fit, and two would leave memory waiting.
template <int kRows, class D>
using Wide = Shape<kRows, 128, sizeof(D) == 4 ? 16 : 32, 1, 8, 4>;
constexpr int64_t kFewRows = 16;

// Kinds of tiles. The first two of a forward are none (rows.cuh); wide ones have 64 rows, the widest 128.
enum class Tiles : uint8_t { kOneRow, kFourRows, kFewRows, kMoreRows, kWide, kWidest };

template <class Body>
struct Instance {
  using type = Body;
};

// Calls `launch(Instance<Body>())` with the kernel that serves a product: by its types (W and Delta both T; Delta in
// fp32; both in fp32, as under autocast) and its tiles.
template <class T, class W, class D, class Launch>
void with_activation(Product product, Tiles tiles, const Launch& launch) {
  if constexpr (sizeof(T) == 2) {  // tf32 has tiles only
    if (tiles == Tiles::kOneRow) return launch(Instance<Rows<1, T, W, D>>());
    if (tiles == Tiles::kFourRows) return launch(Instance<Rows<Warps::kMostRows, T, W, D>>());
  }
  if (product == Product::kInputGradient) {
    launch(Instance<InputGradient<MoreRows, T, W, D>>());
  } else if (tiles == Tiles::kFewRows) {
    launch(Instance<Forward<FewRows, T, W, D>>());
  } else if (tiles == Tiles::kMoreRows) {
    launch(Instance<Forward<MoreRows, T, W, D>>());
  } else if (tiles == Tiles::kWide) {
    launch(Instance<Forward<Wide<64, D>, T, W, D>>());
  } else {
    launch(Instance<Forward<Wide<128, D>, T, W, D>>());
  }
}
// Calls `each` with a value of W's type and one of Delta's.
template <class T, class Each>
void with_types(const LinearProduct& p, const Each& each) {
  if (p.weight_dtype == Dtype::kFloat32) {
    each(float(), float());
  } else if (p.delta_dtype == Dtype::kFloat32) {
    each(T(), float());
  } else {
    each(T(), T());
  }
}
template <class T, class Launch>
void with_instance(Product product, const LinearProduct& p, Tiles tiles, const Launch& launch) {
  if (product != Product::kWeightGradient) {
    with_types<T>(p, [&](auto w, auto d) { with_activation<T, decltype(w), decltype(d)>(product, tiles, launch); });
  } else if (p.delta_dtype == Dtype::kFloat32) {
    launch(Instance<WeightGradient<WeightTile, T, float>>());
  } else {
    launch(Instance<WeightGradient<WeightTile, T, T>>());
  }
}

struct Grid {
  unsigned tiles = 0, splits = 1;  // blocks in x and y
  unsigned slices = 1;             // of the depth in a block, where warps share it (rows.cuh)
  int64_t depth_of_split = 0;
  int64_t bytes = 0;       // of scratch memory
  bool clustered = false;  // the splits of a tile are a cluster
  Tiles kind = Tiles::kMoreRows;
  double cost = 0.0;
};

// The device that a grid is for. Without clusters a second kernel adds the sums of splits (core/choose.h, Adding).
struct Processors {
  int count = 1;
  int most_of_cluster = 0;  // blocks; 0 without clusters
};

// A product's sizes as its grid sees them.
struct Extent {
  int64_t rows, columns, depth;
  int64_t bytes;  // of a weight and its Delta
};

// Whether a cluster adds up so many splits: more than a cluster may have blocks are left to the second kernel.
inline bool in_cluster(int64_t splits, const Processors& on) { return splits > 1 && splits <= on.most_of_cluster; }

// What it costs to split the depth, in bytes of memory traffic: a launch is about 2.5 us, which is 10 MB at 4 TB/s. The
// second kernel is one, and its partial sums are written and read once (mostly in L2). A cluster waits for its blocks
// twice (half a microsecond, assumed), and reads the sums once, from the multiprocessors.
inline double cost_of_splits(int64_t splits, const Extent& of, const Processors& on) {
  const auto sums = static_cast<double>(splits * of.rows * of.columns);
  return splits == 1 ? 0.0 : in_cluster(splits, on) ? 2e6 + 4.0 * sums : 1e7 + 8.0 * sums;
}

// How often to split the depth: it pays where the tiles alone leave multiprocessors without work. What the grid costs
// beside one of other tiles counts what comes from L2, too, a byte of it for four fifths: x for every column of tiles,
// W for every row.
inline Grid plan(Tiles kind, int64_t tile_rows, int64_t tile_columns, int64_t tile_depth, const Extent& of,
                 const Processors& on) {
  Grid grid;
  grid.kind = kind;
  const int64_t down = (of.rows + tile_rows - 1) / tile_rows, across = (of.columns + tile_columns - 1) / tile_columns;
  const int64_t tiles = down * across, steps = std::max<int64_t>((of.depth + tile_depth - 1) / tile_depth, 1);
  grid.tiles = static_cast<unsigned>(tiles);
  const double weight = static_cast<double>(of.columns * of.depth * of.bytes);
  const double passed = 0.8 * static_cast<double>(tiles * steps * tile_depth) *
                        static_cast<double>(2 * tile_rows + of.bytes * tile_columns);
  double best = 0.0;
  for (int64_t splits = 1; splits == 1 || (splits <= 16 && steps >= 4 * splits); ++splits) {
    const int64_t waves = (tiles * splits + on.count - 1) / on.count;
    const double busy = static_cast<double>(tiles * splits) / static_cast<double>(waves * on.count);
    const double partial = cost_of_splits(splits, of, on);
    const double cost = weight / busy + partial;
    if (splits > 1 && cost >= best) continue;
    best = cost;
    grid.cost = std::max(weight, passed) / busy + partial;
    grid.splits = static_cast<unsigned>(splits);
  }
  grid.depth_of_split = (steps + grid.splits - 1) / grid.splits * tile_depth;
  grid.splits = static_cast<unsigned>((steps * tile_depth + grid.depth_of_split - 1) / grid.depth_of_split);
  grid.clustered = in_cluster(grid.splits, on);
  if (grid.splits > 1 && !grid.clustered) {
    grid.bytes = 4 * static_cast<int64_t>(grid.splits) * of.rows * of.columns;
  }
  return grid;
}
template <class S>
Grid plan(Tiles kind, const Extent& of, const Processors& on) {
  return plan(kind, S::kRows, S::kColumns, S::kDepth, of, on);
}

// What a grid tells the kernel.
inline void set_grid(LinearProduct& p, const Grid& grid) {
  p.splits = static_cast<int>(grid.splits), p.slices = static_cast<int>(grid.slices);
  p.depth_of_split = grid.depth_of_split;
}

// The grid of a product of few rows (rows.cuh), whose depth is divided among so many warps of a block.
inline Grid plan_rows(const LinearProduct& p, unsigned slices) {
  Grid grid;
  grid.kind = p.rows == 1 ? Tiles::kOneRow : Tiles::kFourRows;
  const int64_t columns = Warps::kWarps / static_cast<int64_t>(slices) * Warps::kOutputs;
  const int64_t depth = slices * Warps::kAlign;
  grid.tiles = p.rows > 0 ? static_cast<unsigned>((p.outputs + columns - 1) / columns) : 0;
  grid.slices = slices;
  grid.depth_of_split = (p.inputs + depth - 1) / depth * Warps::kAlign;
  return grid;
}

// The same, with slices until there are two blocks to a multiprocessor, as long as each is deep enough.
inline Grid plan_rows(const LinearProduct& p, const Processors& on) {
  unsigned slices = 1;
  while (slices < Warps::kWarps && p.inputs >= 2 * slices * Warps::kLeastDepth &&
         plan_rows(p, slices).tiles < 2 * static_cast<unsigned>(on.count)) {
    slices *= 2;
  }
  return plan_rows(p, slices);
}

inline Extent extent(Product product, const LinearProduct& p) {
  const int64_t bytes = size_of(p.weight_dtype) + (p.delta.data ? size_of(p.delta_dtype) : 0);
  const bool forward = product == Product::kForward;
  return {p.rows, forward ? p.outputs : p.inputs, forward ? p.inputs : p.outputs, bytes};
}

// The grid of a forward or an input gradient in the tiles that every layer has.
inline Grid plan_narrow(Product product, const LinearProduct& p, const Processors& on) {
  const Extent of = extent(product, p);
  if (product == Product::kForward && p.rows <= kFewRows) return plan<FewRows>(Tiles::kFewRows, of, on);
  return plan<MoreRows>(Tiles::kMoreRows, of, on);
}

// The grid of a linear layer's product. Wide tiles are for layers that fill the device with them.
inline Grid plan(Product product, const LinearProduct& p, const Processors& on) {
  if (product == Product::kWeightGradient) {  // the depth is the rows, of which there are few: never split
    using S = WeightTile;
    Grid grid;
    grid.tiles =
        static_cast<unsigned>((p.outputs + S::kRows - 1) / S::kRows * ((p.inputs + S::kColumns - 1) / S::kColumns));
    grid.depth_of_split = p.rows;
    grid.bytes = p.score_gradient ? 8 * static_cast<int64_t>(grid.tiles) : 0;
    return grid;
  }
  if (product == Product::kForward && p.rows <= Warps::kMostRows) return plan_rows(p, on);
  Grid best = plan_narrow(product, p, on);
  if (product != Product::kForward || p.rows <= kFewRows) return best;
  const Extent of = extent(product, p);
  const bool deep = p.delta_dtype != Dtype::kFloat32 && p.weight_dtype != Dtype::kFloat32;
  const int64_t depth = deep ? Wide<64, dev::bf16>::kDepth : Wide<64, float>::kDepth;
  for (const int64_t rows : {64, 128}) {
    const Grid wide = plan(rows == 64 ? Tiles::kWide : Tiles::kWidest, rows, 128, depth, of, on);
    if (wide.cost < best.cost) best = wide;
  }
  return best;
}

// The grid of a convolution's forward, whose splits a second kernel adds, on every device.
inline Grid plan(Product product, const Convolution& p, const Processors& on) {
  return plan_narrow(product, p, {on.count});
}

}  // namespace taps::dev
