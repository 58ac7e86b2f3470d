// What the kernels compute, and what they see of it: pointers, sizes, strides. No torch here, so that the CUDA sources
// compile in a second and the CPU lanes can be compiled per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/change.h"
#include "core/dtype.h"
#include "core/gate.h"
#include "core/walk.h"

namespace taps {

// out = scale * (weight + (gate ? delta : 0)), computed in fp32 (fp64 where an operand is fp64)
// and rounded once. A null weight or delta counts as 0; a closed gate never reads the delta.
struct Rebuild {
  void* out = nullptr;
  const void* weight = nullptr;
  const void* delta = nullptr;
  Dtype out_dtype = Dtype::kFloat32;
  Dtype weight_dtype = Dtype::kFloat32;
  Dtype delta_dtype = Dtype::kFloat32;
  double scale = 1.0;
  Gate gate;

  bool in_double() const {
    return out_dtype == Dtype::kFloat64 || (weight && weight_dtype == Dtype::kFloat64) ||
           (delta && delta_dtype == Dtype::kFloat64);
  }
};

// Of a tensor. `out` may be `weight` or `delta` itself when the walk is flat.
struct Reconstruct : Rebuild {
  Walk<3> walk;  // out, weight, delta
};

// out = weight + (gate ? delta : 0), both row-major and dense; a null weight counts as 0. The CPU's gate is open.
struct Unpack : Rebuild {
  PackedDelta delta;
  // Of a bitmask on a device, which finds its values by counting bits, chunk by chunk.
  int64_t chunk = 0;          // elements; whole tiles
  int64_t* counts = nullptr;  // scratch: a number for each chunk but the last

  int64_t chunks() const { return chunk == 0 ? 0 : (delta.numel() + chunk - 1) / chunk; }
};

// What a codec makes of a Delta, fp32 [rows, columns] in row-major order: its two tensors are written.
struct Encode {
  const float* delta = nullptr;
  Codec codec = Codec::kInt8;
  int64_t rows = 0, columns = 0;
  void* codes = nullptr;
  void* values = nullptr;
  int64_t kept = 0;  // values of kBitmask: of all that are not zero, or of the largest, of equal ones the first

  int64_t numel() const { return rows * columns; }
};

constexpr int64_t kUnpackTile = 2048;        // eight elements for each thread of a block
constexpr int64_t kMostUnpackChunks = 1024;  // as many as a block adds up at once

// The least chunk of which there are no more.
inline int64_t unpack_chunk(const PackedDelta& delta) {
  const int64_t tiles = delta.codec == Codec::kBitmask ? (delta.numel() + kUnpackTile - 1) / kUnpackTile : 0;
  return (tiles + kMostUnpackChunks - 1) / kMostUnpackChunks * kUnpackTile;
}

constexpr int64_t kDotChunk = 16384;  // elements to a partial sum

// Of many tensors by one launch, each dense and of one layout: what a kernel of CUDA 13 takes as arguments is 32 KB.
constexpr int kMostTensors = 256;
struct ForeachReconstruct {
  Rebuild items[kMostTensors];
  int64_t numel[kMostTensors];
  int32_t end[kMostTensors];  // of each item's blocks; the launch sets them
  int count = 0;
};
static_assert(sizeof(ForeachReconstruct) <= 32764, "the arguments of a kernel");

// From G, the gradient of a W_t, to those of its Delta and its score:
//
//     delta_gradient = gate ? gradient : 0, in Delta's type      score_gradient = <gradient, delta>, also where closed
//
// Either result may be null. `delta_gradient` may be `gradient` itself, of one type. `outer` and `inner`, where they
// are not 0: G lies in memory as [rows, inner, outer] and the others as [rows, outer, inner], as G of an input with
// channels last does beside a contiguous weight.
struct Settle {
  void* delta_gradient = nullptr;
  void* score_gradient = nullptr;
  const void* gradient = nullptr;
  const void* delta = nullptr;  // null where no score is asked for
  Dtype gradient_dtype = Dtype::kFloat32, delta_dtype = Dtype::kFloat32, score_dtype = Dtype::kFloat32;
  uint32_t outer = 0, inner = 0;
  Gate gate;

  bool in_double() const { return gradient_dtype == Dtype::kFloat64 || delta_dtype == Dtype::kFloat64; }
};

struct ForeachSettle {
  Settle items[kMostTensors];
  int64_t numel[kMostTensors];
  int32_t end[kMostTensors];
  int count = 0;
  double* partials = nullptr;  // chunks() doubles on the same device

  int64_t chunks() const {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += (numel[i] + kDotChunk - 1) / kDotChunk;
    return total;
  }
  bool scores() const {
    for (int i = 0; i < count; ++i) {
      if (items[i].score_gradient) return true;
    }
    return false;
  }
};
static_assert(sizeof(ForeachSettle) <= 32764, "the arguments of a kernel");

// result = scale * sum(a * b), products and sums in fp64. The order is fixed by the sizes alone:
// chunks of kDotChunk elements, whose sums are added in sequence.
struct Dot {
  Walk<2> walk;
  const void* a = nullptr;
  const void* b = nullptr;
  Dtype a_dtype = Dtype::kFloat32;
  Dtype b_dtype = Dtype::kFloat32;
  double scale = 1.0;
  double* partials = nullptr;  // dot_chunks(walk) doubles on the same device
  void* result = nullptr;
  Dtype result_dtype = Dtype::kFloat32;
};

// How many partial sums a dot has. Strided walks group whole innermost rows instead.
inline int64_t dot_rows_per_chunk(const Walk<2>& walk) {
  const int64_t inner = walk.ndim == 0 ? 1 : walk.sizes[walk.ndim - 1];
  return inner >= kDotChunk ? 1 : kDotChunk / (inner > 0 ? inner : 1);
}

inline int64_t dot_chunks(const Walk<2>& walk) {
  if (walk.numel == 0) return 0;
  if (walk.flat()) return (walk.numel + kDotChunk - 1) / kDotChunk;
  const int64_t rows = walk.numel / walk.sizes[walk.ndim - 1];
  const int64_t per_chunk = dot_rows_per_chunk(walk);
  return (rows + per_chunk - 1) / per_chunk;
}

// A matrix whose rows are `ld` elements apart; the elements of a row are next to each other.
struct Matrix {
  const void* data = nullptr;
  int64_t ld = 0;
};

// One of the three products of a gated linear layer, M = rows, N = outputs, K = inputs, fused with W_t:
//
//     forward           y [M, N] = x W_t^T + bias           reads x, weight, delta, bias; writes result
//     input gradient    dx [M, K] = dy W_t                  reads dy, weight, delta; writes result
//     weight gradient   G [N, K] = dy^T x                   reads dy, x, delta; writes g * scale * G to result (in
//                                                           Delta's type) and scale * <G, Delta> to score_gradient
//
// Either output of the weight gradient may be null. `memory` is scratch of `linear_bytes`, on the device of its plan's
// `bytes`.
struct LinearProduct {
  int64_t rows = 0, outputs = 0, inputs = 0;
  Matrix x, dy, weight, delta;
  PackedDelta packed;  // in the place of delta, on the CPU, for few rows of whole blocks of bits
  const void* bias = nullptr;
  void* result = nullptr;
  int64_t ld_result = 0;
  Dtype compute = Dtype::kBFloat16;  // of x, dy, bias, y, dx
  Dtype weight_dtype = Dtype::kBFloat16;
  Dtype delta_dtype = Dtype::kFloat32;
  Gate gate;
  double scale = 1.0;
  void* score_gradient = nullptr;
  Dtype score_dtype = Dtype::kFloat32;
  void* memory = nullptr;
  int splits = 1;  // of the depth over blocks, and over a block's warps (few rows on CUDA); the launch sets these three
  int slices = 1;
  int64_t depth_of_split = 0;
};

// How a product is planned on the device: once, because what adds its splits may be forced otherwise, by another
// thread, between the question for its memory and the launch.
struct LinearPlan {
  int64_t bytes = 0;        // of `memory`
  int most_of_cluster = 0;  // blocks; 0: a second kernel adds all splits
};

// The forward of a convolution, fused with W_t: a linear layer whose rows are the pixels of its result (`rows` =
// batch * result_size) and whose inputs are those under the kernel, in the order in which a weight's row holds them.
struct Convolution : LinearProduct {
  int64_t channels = 0;
  int64_t size[2] = {}, kernel[2] = {}, stride[2] = {}, padding[2] = {}, dilation[2] = {}, result_size[2] = {};
  int64_t x_strides[4] = {}, result_strides[4] = {};  // of B, C, H, W; tiles write whole rows, ld_result apart
  bool channels_inside = false;                       // a weight's row is kH, kW, C instead of C, kH, kW
};
constexpr int64_t kMostPlaces = 64;  // kH * kW

// One of the three products of a depthwise convolution, fused with W_t: a linear layer for each channel, whose
// `outputs` are the channels and whose `inputs` are those under the kernel. `rows`: pixels of y. x, dy and results of
// their shapes are [B, H, W, C], dense; weight, delta and Delta's gradient [C, kernel, kernel], channels `ld` apart.
struct Depthwise : LinearProduct {
  int64_t batch = 0;
  int32_t kernel = 3;                                                              // both ways: 3, 5 or 7
  int32_t size[2] = {}, result_size[2] = {}, stride[2] = {1, 1}, padding[2] = {};  // [h, w]; stride[1] of 1 or 2
  int32_t vectors = 1;                                                             // the launch sets it
};
constexpr int64_t kMostDepthwise = int64_t{1} << 28;  // pixels of x or of y, padding, rows and columns

// A mixed batch: samples of many tasks in any order, of `each` rows (`product.rows` together), each multiplied with the
// W_t of its own. `ids` [samples] tell the tasks: `first_task` to `first_task + count - 1` are those of this launch, -1
// is the base, and what is not below `all_tasks` gets NaN. The base and what has no task go with the launch whose
// first task is 0. A task that joins the base is closed, and no gradient of it is asked for.
//
// `product` has all but Delta, gate and score, which are each task's own; of one type all Deltas.
struct MixedTask {
  Matrix delta;
  Gate gate;
  void* delta_gradient = nullptr;  // both zero where the task has no sample
  int64_t ld_gradient = 0;
  void* score_gradient = nullptr;
  Dtype score_dtype = Dtype::kFloat32;
  bool joins = false;
};

// Rows of one group in the order of groups: the base's, those of each task, those of no task.
struct MixedTile {
  int32_t group, first, rows, unused;
};

constexpr int kMostTasks = 256;
struct MixedBatch {
  LinearProduct product;
  const int64_t* ids = nullptr;
  int64_t ids_step = 1, samples = 0, each = 0;
  int64_t first_task = 0, all_tasks = 0;
  int32_t count = 0;
  // Scratch memory of `mixed_bytes` in `product.memory`; the launch sets these. The samples in the order of groups;
  // where each group begins, and the last ends; the tiles, and how many there are of `slots`.
  int32_t *order = nullptr, *starts = nullptr, *used = nullptr;
  MixedTile* tiles = nullptr;
  uint32_t slots = 0;
  int32_t tile = 64;           // rows of a tile
  double* partials = nullptr;  // of <G, Delta>
  MixedTask tasks[kMostTasks];
};
static_assert(sizeof(MixedBatch) <= 32764, "the arguments of a kernel");

// What the rows of samples whose ids are of no task become, where a product has not looked at ids: NaN, all bits set.
struct Spoil {
  void* data = nullptr;  // samples of `words` 16-bit words, one behind the other
  const int64_t* ids = nullptr;
  int64_t ids_step = 1, samples = 0, words = 0, all_tasks = 0;
};

enum class Product : int8_t { kForward, kInputGradient, kWeightGradient };

namespace cpu {
void reconstruct(const Reconstruct& args);
int64_t count_bits(const void* bits, int64_t bytes);
void unpack(const Unpack& args);
bool encode(const Encode& args);  // whether the codec holds these values
void dot(const Dot& args);
bool all_finite(const Walk<1>& walk, const void* data, Dtype dtype);
int64_t linear_bytes(const LinearProduct& args);  // of `memory`
void linear(const LinearProduct& args);           // the forward
// Forwards of few rows each with one weight and Deltas of their own: the weight is read once. Each gives the bits that
// it gives alone.
int64_t linear_together_bytes(const LinearProduct* products, size_t count);
void linear_together(const LinearProduct* products, size_t count, void* memory);
int64_t conv2d_bytes(const Convolution& args);
void conv2d(const Convolution& args);
}  // namespace cpu

// On CUDA, or in a build for tests on the CPU, by the host twin (tests/kernels/host).
#if defined(TAPS_WITH_CUDA) || defined(TAPS_WITH_TWIN)
namespace cuda {
void reconstruct(const Reconstruct& args, int device, void* stream);
// Of these all items are in fp64, or none.
void foreach_reconstruct(ForeachReconstruct args, int device, void* stream);
void foreach_settle(ForeachSettle args, int device, void* stream);
void unpack(const Unpack& args, int device, void* stream);
void dot(const Dot& args, int device, void* stream);
// 16-bit compute types, with W and Delta in that type or in fp32. A product is launched as it was planned.
LinearPlan plan_linear(Product product, const LinearProduct& args, int device);
void linear(Product product, LinearProduct args, const LinearPlan& planned, int device, void* stream);
// The same types. Forward and input gradient, and the gradients of Deltas and scores; all in one call share the order.
int64_t mixed_bytes(const MixedBatch& args);
void mixed_order(MixedBatch& args, int device, void* stream);  // sets the scratch memory's parts
void mixed(Product product, const MixedBatch& args, int device, void* stream);
void spoil(const Spoil& args, int device, void* stream);
// The same types; pixels of whole pieces of 16 bytes, W and Delta in rows of kH, kW, C, the result [rows, outputs].
int64_t conv2d_bytes(const Convolution& args, int device);
void conv2d(Convolution args, int device, void* stream);
// bf16, fp16 and fp32, with W and Delta each in that type or in fp32.
int64_t depthwise_bytes(Product product, const Depthwise& args, int device);
void depthwise(Product product, Depthwise args, int device, void* stream);
}  // namespace cuda
#endif

}  // namespace taps
