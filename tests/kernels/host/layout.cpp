// Where the fields of the kernels' arguments are, by name: what a test needs to write them itself.
#include <cstddef>
#include <cstdio>

#include "kernels.h"

#define TAPS_FIELD(type, field) std::printf(#type "." #field " %zu\n", offsetof(taps::type, field))

#define TAPS_REBUILD(type)            \
  TAPS_FIELD(type, out);              \
  TAPS_FIELD(type, weight);           \
  TAPS_FIELD(type, out_dtype);        \
  TAPS_FIELD(type, weight_dtype);     \
  TAPS_FIELD(type, delta_dtype);      \
  TAPS_FIELD(type, scale);            \
  TAPS_FIELD(type, gate.open);        \
  TAPS_FIELD(type, gate.score);       \
  TAPS_FIELD(type, gate.score_dtype); \
  TAPS_FIELD(type, gate.threshold)

#define TAPS_PRODUCT(type)            \
  TAPS_FIELD(type, rows);             \
  TAPS_FIELD(type, outputs);          \
  TAPS_FIELD(type, inputs);           \
  TAPS_FIELD(type, x);                \
  TAPS_FIELD(type, dy);               \
  TAPS_FIELD(type, weight);           \
  TAPS_FIELD(type, delta);            \
  TAPS_FIELD(type, bias);             \
  TAPS_FIELD(type, result);           \
  TAPS_FIELD(type, ld_result);        \
  TAPS_FIELD(type, compute);          \
  TAPS_FIELD(type, weight_dtype);     \
  TAPS_FIELD(type, delta_dtype);      \
  TAPS_FIELD(type, gate.open);        \
  TAPS_FIELD(type, gate.score);       \
  TAPS_FIELD(type, gate.score_dtype); \
  TAPS_FIELD(type, gate.threshold);   \
  TAPS_FIELD(type, scale);            \
  TAPS_FIELD(type, score_gradient);   \
  TAPS_FIELD(type, memory);           \
  TAPS_FIELD(type, splits);           \
  TAPS_FIELD(type, depth_of_split)

#define TAPS_WALK(type)         \
  TAPS_FIELD(type, walk.numel); \
  TAPS_FIELD(type, walk.ndim);  \
  TAPS_FIELD(type, walk.sizes); \
  TAPS_FIELD(type, walk.strides)

int main() {
  std::printf("LinearProduct %zu\n", sizeof(taps::LinearProduct));
  TAPS_PRODUCT(LinearProduct);
  TAPS_FIELD(LinearProduct, score_dtype);
  TAPS_FIELD(LinearProduct, slices);

  std::printf("Convolution %zu\n", sizeof(taps::Convolution));  // its product's fields come first
  TAPS_FIELD(Convolution, channels);
  TAPS_FIELD(Convolution, size);
  TAPS_FIELD(Convolution, kernel);
  TAPS_FIELD(Convolution, stride);
  TAPS_FIELD(Convolution, padding);
  TAPS_FIELD(Convolution, dilation);
  TAPS_FIELD(Convolution, result_size);
  TAPS_FIELD(Convolution, x_strides);
  std::printf("MixedBatch %zu\n", sizeof(taps::MixedBatch));
  TAPS_FIELD(MixedBatch, product);
  TAPS_FIELD(MixedBatch, ids);
  TAPS_FIELD(MixedBatch, ids_step);
  TAPS_FIELD(MixedBatch, samples);
  TAPS_FIELD(MixedBatch, each);
  TAPS_FIELD(MixedBatch, first_task);
  TAPS_FIELD(MixedBatch, all_tasks);
  TAPS_FIELD(MixedBatch, count);
  TAPS_FIELD(MixedBatch, order);
  TAPS_FIELD(MixedBatch, starts);
  TAPS_FIELD(MixedBatch, used);
  TAPS_FIELD(MixedBatch, tiles);
  TAPS_FIELD(MixedBatch, slots);
  TAPS_FIELD(MixedBatch, tile);
  TAPS_FIELD(MixedBatch, partials);
  TAPS_FIELD(MixedBatch, tasks);
  std::printf("MixedTask %zu\n", sizeof(taps::MixedTask));
  TAPS_FIELD(MixedTask, delta);
  TAPS_FIELD(MixedTask, gate.open);
  TAPS_FIELD(MixedTask, gate.score);
  TAPS_FIELD(MixedTask, gate.score_dtype);
  TAPS_FIELD(MixedTask, gate.threshold);
  TAPS_FIELD(MixedTask, delta_gradient);
  TAPS_FIELD(MixedTask, ld_gradient);
  TAPS_FIELD(MixedTask, score_gradient);
  TAPS_FIELD(MixedTask, score_dtype);
  TAPS_FIELD(MixedTask, joins);
  std::printf("Spoil %zu\n", sizeof(taps::Spoil));
  TAPS_FIELD(Spoil, data);
  TAPS_FIELD(Spoil, ids);
  TAPS_FIELD(Spoil, ids_step);
  TAPS_FIELD(Spoil, samples);
  TAPS_FIELD(Spoil, words);
  TAPS_FIELD(Spoil, all_tasks);
  std::printf("Depthwise %zu\n", sizeof(taps::Depthwise));
  TAPS_PRODUCT(Depthwise);
  TAPS_FIELD(Depthwise, batch);
  TAPS_FIELD(Depthwise, kernel);
  TAPS_FIELD(Depthwise, size);
  TAPS_FIELD(Depthwise, result_size);
  TAPS_FIELD(Depthwise, stride);
  TAPS_FIELD(Depthwise, padding);
  TAPS_FIELD(Depthwise, vectors);

  std::printf("Reconstruct %zu\n", sizeof(taps::Reconstruct));
  TAPS_REBUILD(Reconstruct);
  TAPS_FIELD(Reconstruct, delta);
  TAPS_WALK(Reconstruct);

  std::printf("Rebuild %zu\n", sizeof(taps::Rebuild));
  TAPS_REBUILD(Rebuild);
  TAPS_FIELD(Rebuild, delta);
  std::printf("ForeachReconstruct %zu\n", sizeof(taps::ForeachReconstruct));
  TAPS_FIELD(ForeachReconstruct, items);
  TAPS_FIELD(ForeachReconstruct, numel);
  TAPS_FIELD(ForeachReconstruct, end);
  TAPS_FIELD(ForeachReconstruct, count);

  std::printf("Settle %zu\n", sizeof(taps::Settle));
  TAPS_FIELD(Settle, delta_gradient);
  TAPS_FIELD(Settle, score_gradient);
  TAPS_FIELD(Settle, gradient);
  TAPS_FIELD(Settle, delta);
  TAPS_FIELD(Settle, gradient_dtype);
  TAPS_FIELD(Settle, delta_dtype);
  TAPS_FIELD(Settle, score_dtype);
  TAPS_FIELD(Settle, outer);
  TAPS_FIELD(Settle, inner);
  TAPS_FIELD(Settle, gate.open);
  TAPS_FIELD(Settle, gate.score);
  TAPS_FIELD(Settle, gate.score_dtype);
  TAPS_FIELD(Settle, gate.threshold);
  std::printf("ForeachSettle %zu\n", sizeof(taps::ForeachSettle));
  TAPS_FIELD(ForeachSettle, items);
  TAPS_FIELD(ForeachSettle, numel);
  TAPS_FIELD(ForeachSettle, end);
  TAPS_FIELD(ForeachSettle, count);
  TAPS_FIELD(ForeachSettle, partials);

  std::printf("Unpack %zu\n", sizeof(taps::Unpack));
  TAPS_REBUILD(Unpack);
  TAPS_FIELD(Unpack, delta.codec);
  TAPS_FIELD(Unpack, delta.codes);
  TAPS_FIELD(Unpack, delta.values);
  TAPS_FIELD(Unpack, delta.rows);
  TAPS_FIELD(Unpack, delta.columns);
  TAPS_FIELD(Unpack, delta.kept);
  TAPS_FIELD(Unpack, chunk);
  TAPS_FIELD(Unpack, counts);

  std::printf("Dot %zu\n", sizeof(taps::Dot));
  TAPS_WALK(Dot);
  TAPS_FIELD(Dot, a);
  TAPS_FIELD(Dot, b);
  TAPS_FIELD(Dot, a_dtype);
  TAPS_FIELD(Dot, b_dtype);
  TAPS_FIELD(Dot, scale);
  TAPS_FIELD(Dot, partials);
  TAPS_FIELD(Dot, result);
  TAPS_FIELD(Dot, result_dtype);
}
