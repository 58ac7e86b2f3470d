// The products of a mixed batch (kernels.h): rows of many tasks, in any order. One block puts the samples into the
// order of their tasks, on the device, because the host may not know their ids and would have to wait for them. Then
// one launch multiplies all tiles, each of one task's rows, which are gathered on their way in and scattered on their
// way out. Weight gradients have a block for each task and tile of G, which goes through that task's rows in the
// batch's order. One definition for nvcc and for the twin; the launches are in mixed.cu.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/linear.cuh"

namespace taps::dev {

// --- the order -----------------------------------------------------------------------------------------------------

constexpr int kMostGroups = kMostTasks + 2;  // the base, and what has no task
constexpr unsigned kIdsAtOnce = 1024;
constexpr unsigned kOrderShared = 4 * (kIdsAtOnce + 3 * kMostGroups);

// The group of a sample, or -1 where another launch has it.
TAPS_DEVICE int group_of(const MixedBatch& m, int64_t id) {
  const bool first = m.first_task == 0;
  if (id < -1 || id >= m.all_tasks) return first ? m.count + 1 : -1;
  if (id == -1) return first ? 0 : -1;
  const int64_t task = id - m.first_task;
  if (task < 0 || task >= m.count) return -1;
  return m.tasks[task].joins ? 0 : static_cast<int>(task) + 1;
}

// Calls each(sample, group) with the groups of all samples in turn, `kIdsAtOnce` of them in shared memory.
template <class Each>
TAPS_DEVICE void for_samples(const MixedBatch& m, bool looks, const Each& each) {
  const sh<int32_t> groups = as<int32_t>(arena(), 0);
  for (int64_t begin = 0; begin < m.samples; begin += kIdsAtOnce) {
    const int64_t left = m.samples - begin;
    const unsigned count = left < kIdsAtOnce ? static_cast<unsigned>(left) : kIdsAtOnce;
    block_sync();  // those before have been looked at
    for (unsigned i = tid(); i < count; i += nthreads()) st(groups, i, group_of(m, m.ids[(begin + i) * m.ids_step]));
    block_sync();  // these are there
    if (!looks) continue;
    for (unsigned i = 0; i < count; ++i) each(static_cast<int32_t>(begin) + static_cast<int32_t>(i), ld(groups, i));
  }
}

// Stable: a thread has a group, and finds its samples one after the other.
TAPS_DEVICE void order_samples(const MixedBatch& m) {
  const int groups = m.count + 2, each = static_cast<int>(m.each), tile = m.tile;
  const sh<int32_t> counts = as<int32_t>(arena(), 4 * kIdsAtOnce);  // samples of a group, and where they begin
  const sh<int32_t> starts = as<int32_t>(arena(), 4 * (kIdsAtOnce + kMostGroups));
  const sh<int32_t> ends = as<int32_t>(arena(), 4 * (kIdsAtOnce + 2 * kMostGroups));  // of a group's tiles
  for (int first = 0; first < groups; first += static_cast<int>(nthreads())) {
    const int group = first + static_cast<int>(tid());
    int count = 0;
    for_samples(m, group < groups, [&](int32_t, int other) { count += other == group; });
    if (group < groups) st(counts, static_cast<unsigned>(group), count);
  }
  block_sync();  // all groups are counted
  for (int first = 0; first < groups; first += static_cast<int>(nthreads())) {
    const int group = first + static_cast<int>(tid());
    int start = 0, end = 0;
    for (int before = 0; before <= group && before < groups; ++before) {
      const int count = ld(counts, static_cast<unsigned>(before));
      if (before < group) start += count;
      end += (count * each + tile - 1) / tile;
    }
    if (group < groups) {
      st(starts, static_cast<unsigned>(group), start);
      st(ends, static_cast<unsigned>(group), end);
      m.starts[group] = start;
      if (group + 1 == groups) {
        m.starts[groups] = start + ld(counts, static_cast<unsigned>(group));
        *m.used = end;
      }
    }
    for_samples(m, group < groups, [&](int32_t sample, int other) {
      if (other == group) m.order[start++] = sample;
    });
  }
  block_sync();  // the ends of all groups are there
  const int used = ld(ends, static_cast<unsigned>(groups) - 1);
  for (int slot = static_cast<int>(tid()); slot < used; slot += static_cast<int>(nthreads())) {
    int group = 0, last = groups - 1;  // the first one whose tiles end after this
    while (group < last) {
      const int middle = (group + last) / 2;
      if (slot < ld(ends, static_cast<unsigned>(middle))) {
        last = middle;
      } else {
        group = middle + 1;
      }
    }
    const int within = slot - (group > 0 ? ld(ends, static_cast<unsigned>(group) - 1) : 0);
    const int begin = ld(starts, static_cast<unsigned>(group)) * each + within * tile;
    const int left = ld(counts, static_cast<unsigned>(group)) * each - within * tile;
    m.tiles[slot] = {group, begin, left < tile ? left : tile, 0};
  }
}

// Where the row at a position in the order of groups is in the batch.
TAPS_DEVICE int32_t row_at(const MixedBatch& m, int32_t position) {
  const auto at = static_cast<uint32_t>(position), each = static_cast<uint32_t>(m.each);
  return m.order[at / each] * static_cast<int32_t>(each) + static_cast<int32_t>(at % each);
}

// --- operands ------------------------------------------------------------------------------------------------------

// The rows that a tile takes of a matrix [.., depth], wherever they are; `rows` are their numbers, `count` of them.
// What Stream does, with a row's number in the place of its distance from the first.
template <class S, class T>
class Picked {
 public:
  static constexpr int kStride = stride_of<T, T>(S::kDepth, false);
  static constexpr unsigned kBytes = S::kRows * kStride * sizeof(T);

  TAPS_DEVICE Picked(const View<T>& from, sh<int32_t> rows, int count)
      : data_(from.data), ld_(from.ld), rows_(rows), count_(count), piece_(from.piece()) {
    const int row = Share<16>::row();
    there_ = row < count;
    next_ = data_ + (there_ ? ld(rows_, static_cast<unsigned>(row)) * ld_ : 0) + Share<16>::column();
  }
  TAPS_DEVICE void seek(int64_t depth) { at_ = depth, next_ += depth; }
  TAPS_DEVICE bool whole() const { return piece_ == 16; }
  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) {
    using Mine = Share<16>;
    static_assert(Mine::kPass >= S::kRows, "a thread has one row at most");
    if (Mine::kPass == S::kRows || Mine::row() < S::kRows) {
      cp_async<16>(as<T>(stage, 0), static_cast<unsigned>(Mine::row() * kStride + Mine::column()), next_,
                   there_ ? 16u : 0u);
    }
    at_ += S::kDepth, next_ += S::kDepth;
  }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) {
    if (piece_ == 16) {
      pieces<16>(as<T>(stage, 0), depth);
    } else if (piece_ == 4) {
      pieces<4>(as<T>(stage, 0), depth);
    } else {
      pieces<sizeof(T)>(as<T>(stage, 0), depth);
    }
    at_ += S::kDepth, next_ += S::kDepth;
  }

 private:
  template <int kPieceBytes>
  struct Share {
    static constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T)), kPieces = S::kDepth / kPiece;
    static constexpr int kPass = S::kThreads / kPieces;
    static TAPS_DEVICE int row() { return static_cast<int>(tid()) / kPieces; }
    static TAPS_DEVICE int column() { return static_cast<int>(tid()) % kPieces * kPiece; }
  };

  template <int kPieceBytes>
  TAPS_DEVICE void pieces(sh<T> tile, int depth) const {
    using Mine = Share<kPieceBytes>;
    const int column = Mine::column(), left = depth - column;
    const int elements = left >= Mine::kPiece ? Mine::kPiece : (left > 0 ? left : 0);
#pragma unroll
    for (int pass = 0; pass < (S::kRows + Mine::kPass - 1) / Mine::kPass; ++pass) {
      const int row = Mine::row() + pass * Mine::kPass;
      if (S::kRows % Mine::kPass != 0 && row >= S::kRows) break;
      const bool there = row < count_ && elements > 0;
      const T* from = data_;
      if (there) from += ld(rows_, static_cast<unsigned>(row)) * ld_ + at_ + column;
      const unsigned to = static_cast<unsigned>(row * kStride + column);
      if constexpr (kPieceBytes >= 4) {
        cp_async<kPieceBytes>(tile, to, from, there ? static_cast<unsigned>(elements * sizeof(T)) : 0u);
      } else {
        st(tile, to, there ? *from : T{});
      }
    }
  }

  const T *data_, *next_;  // next_: this thread's piece of the next whole stage
  int64_t ld_, at_ = 0;
  sh<int32_t> rows_;
  int count_, piece_;
  bool there_;
};

// The same where the depth runs down the rows: one task's, from position `first` on in the order of groups. kAcross
// columns from `column` on, which end at `end`.
template <class S, class T, int kAcross>
class PickedDepth {
 public:
  static constexpr int kStride = stride_of<T, T>(kAcross, true);
  static constexpr unsigned kBytes = S::kDepth * kStride * sizeof(T);

  TAPS_DEVICE PickedDepth(const MixedBatch& m, const View<T>& from, int64_t column, int64_t end, int32_t first)
      : m_(m), data_(from.data + column), ld_(from.ld), at_(first), piece_(from.piece()) {
    const int64_t left = end - column;
    left_ = left < kAcross ? static_cast<int>(left) : kAcross;
  }
  TAPS_DEVICE void seek(int64_t depth) { at_ += static_cast<int32_t>(depth); }
  TAPS_DEVICE bool whole() const { return piece_ == 16 && left_ == kAcross; }
  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) {
    pieces<16, true>(as<T>(stage, 0), S::kDepth);
    at_ += S::kDepth;
  }
  TAPS_DEVICE void fetch(sh<unsigned char> stage, int depth) {
    if (piece_ == 16) {
      pieces<16, false>(as<T>(stage, 0), depth);
    } else if (piece_ == 4) {
      pieces<4, false>(as<T>(stage, 0), depth);
    } else {
      pieces<sizeof(T), false>(as<T>(stage, 0), depth);
    }
    at_ += S::kDepth;
  }

 private:
  template <int kPieceBytes, bool kWhole>
  TAPS_DEVICE void pieces(sh<T> tile, int depth) const {
    constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T)), kPieces = kAcross / kPiece;
    constexpr int kPass = S::kThreads / kPieces;
    static_assert(kPass * kPieces == S::kThreads, "rows shared evenly by the threads");
    const int column = static_cast<int>(tid()) % kPieces * kPiece, left = left_ - column;
    const int elements = kWhole || left >= kPiece ? kPiece : (left > 0 ? left : 0);
#pragma unroll
    for (int pass = 0; pass < (S::kDepth + kPass - 1) / kPass; ++pass) {
      const int row = static_cast<int>(tid()) / kPieces + pass * kPass;
      if (S::kDepth % kPass != 0 && row >= S::kDepth) break;
      const bool there = kWhole || (row < depth && elements > 0);
      const T* from = data_;
      if (there) from += row_at(m_, at_ + row) * ld_ + column;
      const unsigned to = static_cast<unsigned>(row * kStride + column);
      if constexpr (kPieceBytes >= 4) {
        cp_async<kPieceBytes>(tile, to, from, there ? static_cast<unsigned>(elements * sizeof(T)) : 0u);
      } else {
        st(tile, to, there ? *from : T{});
      }
    }
  }

  const MixedBatch& m_;
  const T* data_;
  int64_t ld_;
  int32_t at_;
  int piece_, left_;
};

// --- products ------------------------------------------------------------------------------------------------------

// y = x W_t^T + bias, or with kBackward dx = dy W_t, of every row by its own W_t. Blocks beyond the tiles in use have
// nothing to do: the host knows only how many there may be.
template <class S, class T, class W, class D, bool kBackward>
struct MixedActivation {
  using Tile = S;
  using A = Straight<S, T, Picked<S, T>>;
  template <bool kOpen>
  using B = Gated<S, T, W, D, kBackward, kOpen>;
  using Open = Ring<S, T, A, B<true>>;
  using Closed = Ring<S, T, A, B<false>>;
  static_assert(Closed::kShared <= Open::kShared, "a block has what the open loop needs");
  struct Loop {
    static constexpr unsigned kShared = Open::kShared + 4 * S::kRows;
  };

  static TAPS_DEVICE void run(const MixedBatch& m) {
    const LinearProduct& p = m.product;
    const unsigned slot = bid_x() % m.slots;
    if (slot >= static_cast<unsigned>(*m.used)) return;
    const MixedTile tile = m.tiles[slot];
    const int64_t column = static_cast<int64_t>(bid_x() / m.slots) * S::kColumns;
    const int64_t depth = kBackward ? p.outputs : p.inputs, columns = kBackward ? p.inputs : p.outputs;
    const sh<int32_t> rows = as<int32_t>(arena(), Open::kShared);
    if (tid() < static_cast<unsigned>(tile.rows)) {
      st(rows, tid(), row_at(m, tile.first + static_cast<int32_t>(tid())));
    }
    block_sync();  // the rows' numbers are there
    float sum[S::kM][S::kN][4] = {};
    if (tile.group > m.count) {
      for_pairs<S>(sum, [&](unsigned i, unsigned j, unsigned, float, float) {
        leave(p, tile, rows, column, columns, i, j, float_of(0x7fc00000u), float_of(0x7fc00000u));
      });
      return;
    }
    const A left(kBackward ? p.dy : p.x, rows, tile.rows);
    const int task = tile.group - 1;
    if (task >= 0 && is_open(m.tasks[task].gate)) {  // asked once
      Open::multiply(sum, left, B<true>(p.weight, m.tasks[task].delta, column, columns), 0, depth);
    } else {
      Closed::multiply(sum, left, B<false>(p.weight, Matrix(), column, columns), 0, depth);
    }
    if (S::slice() != 0) return;
    const T* const bias = static_cast<const T*>(p.bias);
    for_pairs<S>(sum, [&](unsigned i, unsigned j, unsigned, float first, float second) {
      const int64_t c = column + j;
      if (bias && c < columns) first += to_f32(bias[c]);
      if (bias && c + 1 < columns) second += to_f32(bias[c + 1]);
      leave(p, tile, rows, column, columns, i, j, first, second);
    });
  }

 private:
  // Two neighbours of a row, to where it belongs.
  static TAPS_DEVICE void leave(const LinearProduct& p, const MixedTile& tile, sh<int32_t> rows, int64_t column,
                                int64_t columns, unsigned i, unsigned j, float first, float second) {
    if (static_cast<int>(i) >= tile.rows || column + j >= columns) return;
    T* const to = static_cast<T*>(p.result) + ld(rows, i) * p.ld_result + column + j;
    to[0] = from_f32<T>(first);
    if (column + j + 1 < columns) to[1] = from_f32<T>(second);
  }
};

// The same as WeightGradient of one task's rows, a block for each tile (x) of each task's G (y).
template <class S, class T, class D>
struct MixedWeightGradient {
  using Tile = S;
  using A = Turned<S, T, PickedDepth<S, T, S::kRows>>;
  using B = Plain<S, T, PickedDepth<S, T, S::kColumns>>;
  using Loop = Ring<S, T, A, B>;

  static TAPS_DEVICE void run(const MixedBatch& m) {
    const MixedTask& task = m.tasks[bid_y()];
    if (!task.delta_gradient && !task.score_gradient) return;
    const Place<S> place(m.product.outputs);
    const auto each = static_cast<int32_t>(m.each);
    const int32_t first = m.starts[bid_y() + 1] * each, rows = m.starts[bid_y() + 2] * each - first;
    const int64_t at = static_cast<int64_t>(bid_y()) * nblocks_x() + bid_x();
    LinearProduct p = m.product;
    p.memory = m.partials;
    p.delta = task.delta;
    p.result = task.delta_gradient, p.ld_result = task.ld_gradient;
    p.score_gradient = rows > 0 ? task.score_gradient : nullptr;  // without rows Delta may be anything
    const bool open = is_open(task.gate);
    float sum[S::kM][S::kN][4] = {};
    Loop::multiply(sum, A(m, p.dy, place.row, p.outputs, first), B(m, p.x, place.column, p.inputs, first), 0, rows);
    WeightGradient<S, T, D>::settle(sum, p, place, open, at);
    if (rows == 0 && task.score_gradient && tid() == 0) m.partials[at] = 0.0;
  }
};

// The sums of a task's blocks, `count` of them, in a fixed order: a block to a task.
TAPS_DEVICE void mixed_scores(const MixedBatch& m, int64_t count) {
  const MixedTask& task = m.tasks[bid_x()];
  if (!task.score_gradient) return;
  dot_finish(m.partials + bid_x() * count, count, m.product.scale, task.score_gradient, task.score_dtype);
}

// A block to a sample.
TAPS_DEVICE void spoil_sample(const Spoil& args) {
  const int64_t id = args.ids[bid_x() * args.ids_step];
  if (id >= -1 && id < args.all_tasks) return;
  uint16_t* const to = static_cast<uint16_t*>(args.data) + bid_x() * args.words;
  for (int64_t i = tid(); i < args.words; i += nthreads()) to[i] = 0xffff;
}

// --- grids, on the host --------------------------------------------------------------------------------------------

// Calls `launch(Instance<Body>())` with the kernel of an activation's product.
template <class T, class W, class D, class Launch>
void with_mixed_types(Product product, const Launch& launch) {
  if (product == Product::kForward) {
    launch(Instance<MixedActivation<MoreRows, T, W, D, false>>());
  } else {
    launch(Instance<MixedActivation<MoreRows, T, W, D, true>>());
  }
}
template <class T, class Launch>
void with_mixed(Product product, const LinearProduct& p, const Launch& launch) {
  if (product != Product::kWeightGradient) {
    with_types<T>(p, [&](auto w, auto d) { with_mixed_types<T, decltype(w), decltype(d)>(product, launch); });
  } else if (p.delta_dtype == Dtype::kFloat32) {
    launch(Instance<MixedWeightGradient<WeightTile, T, float>>());
  } else {
    launch(Instance<MixedWeightGradient<WeightTile, T, T>>());
  }
}

static_assert(MoreRows::kRows == MixedBatch().tile, "the rows of a tile that are planned with");

// As many tiles as there may be: one of few rows for each group that has samples, and all that are full.
inline uint32_t mixed_slots(const MixedBatch& m) {
  const int64_t groups = m.count + 2, present = groups < m.samples ? groups : m.samples;
  return static_cast<uint32_t>(m.samples * m.each / m.tile + present);
}

// Tiles of a matrix [rows, columns].
template <class S>
int64_t tiles_of(int64_t rows, int64_t columns) {
  return (rows + S::kRows - 1) / S::kRows * ((columns + S::kColumns - 1) / S::kColumns);
}

// The parts of the scratch memory, where a weight gradient's tiles are S; returns its bytes.
template <class S = WeightTile>
int64_t mixed_parts(MixedBatch& m) {
  int64_t bytes = 0;
  const auto part = [&](auto*& data, int64_t count) {
    data = nullptr;
    if (m.product.memory && count > 0) {
      data = reinterpret_cast<decltype(data + 0)>(static_cast<char*>(m.product.memory) + bytes);
    }
    bytes += (count * static_cast<int64_t>(sizeof(*data)) + 15) / 16 * 16;
  };
  m.slots = mixed_slots(m);
  bool scores = false;
  for (int task = 0; task < m.count; ++task) scores = scores || m.tasks[task].score_gradient;
  part(m.partials, scores ? m.count * tiles_of<S>(m.product.outputs, m.product.inputs) : 0);
  part(m.tiles, m.slots);
  part(m.order, m.samples);
  part(m.starts, m.count + 3);
  part(m.used, 1);
  return bytes;
}

// Blocks of a product in x and y, in tiles S; none where there is nothing to do.
template <class S>
Grid mixed_grid(Product product, const MixedBatch& m) {
  Grid grid;
  if (product == Product::kWeightGradient) {
    grid.tiles = static_cast<unsigned>(tiles_of<S>(m.product.outputs, m.product.inputs));
    grid.splits = static_cast<unsigned>(m.count);
    return grid;
  }
  const int64_t columns = product == Product::kForward ? m.product.outputs : m.product.inputs;
  grid.tiles = m.slots * static_cast<unsigned>((columns + S::kColumns - 1) / S::kColumns);
  return grid;
}

}  // namespace taps::dev
