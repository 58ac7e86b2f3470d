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

#define TAPS_WALK(type)         \
  TAPS_FIELD(type, walk.numel); \
  TAPS_FIELD(type, walk.ndim);  \
  TAPS_FIELD(type, walk.sizes); \
  TAPS_FIELD(type, walk.strides)

int main() {
  std::printf("LinearProduct %zu\n", sizeof(taps::LinearProduct));
  TAPS_FIELD(LinearProduct, rows);
  TAPS_FIELD(LinearProduct, outputs);
  TAPS_FIELD(LinearProduct, inputs);
  TAPS_FIELD(LinearProduct, x);
  TAPS_FIELD(LinearProduct, dy);
  TAPS_FIELD(LinearProduct, weight);
  TAPS_FIELD(LinearProduct, delta);
  TAPS_FIELD(LinearProduct, bias);
  TAPS_FIELD(LinearProduct, result);
  TAPS_FIELD(LinearProduct, ld_result);
  TAPS_FIELD(LinearProduct, compute);
  TAPS_FIELD(LinearProduct, weight_dtype);
  TAPS_FIELD(LinearProduct, delta_dtype);
  TAPS_FIELD(LinearProduct, gate.open);
  TAPS_FIELD(LinearProduct, gate.score);
  TAPS_FIELD(LinearProduct, gate.score_dtype);
  TAPS_FIELD(LinearProduct, gate.threshold);
  TAPS_FIELD(LinearProduct, scale);
  TAPS_FIELD(LinearProduct, score_gradient);
  TAPS_FIELD(LinearProduct, score_dtype);
  TAPS_FIELD(LinearProduct, memory);
  TAPS_FIELD(LinearProduct, splits);
  TAPS_FIELD(LinearProduct, slices);
  TAPS_FIELD(LinearProduct, depth_of_split);

  std::printf("Convolution %zu\n", sizeof(taps::Convolution));  // its product's fields come first
  TAPS_FIELD(Convolution, channels);
  TAPS_FIELD(Convolution, size);
  TAPS_FIELD(Convolution, kernel);
  TAPS_FIELD(Convolution, stride);
  TAPS_FIELD(Convolution, padding);
  TAPS_FIELD(Convolution, dilation);
  TAPS_FIELD(Convolution, result_size);
  TAPS_FIELD(Convolution, x_strides);
  std::printf("Depthwise %zu\n", sizeof(taps::Depthwise));
  TAPS_FIELD(Depthwise, rows);
  TAPS_FIELD(Depthwise, outputs);
  TAPS_FIELD(Depthwise, inputs);
  TAPS_FIELD(Depthwise, x);
  TAPS_FIELD(Depthwise, dy);
  TAPS_FIELD(Depthwise, weight);
  TAPS_FIELD(Depthwise, delta);
  TAPS_FIELD(Depthwise, bias);
  TAPS_FIELD(Depthwise, result);
  TAPS_FIELD(Depthwise, ld_result);
  TAPS_FIELD(Depthwise, compute);
  TAPS_FIELD(Depthwise, weight_dtype);
  TAPS_FIELD(Depthwise, delta_dtype);
  TAPS_FIELD(Depthwise, gate.open);
  TAPS_FIELD(Depthwise, gate.score);
  TAPS_FIELD(Depthwise, gate.score_dtype);
  TAPS_FIELD(Depthwise, gate.threshold);
  TAPS_FIELD(Depthwise, scale);
  TAPS_FIELD(Depthwise, score_gradient);
  TAPS_FIELD(Depthwise, memory);
  TAPS_FIELD(Depthwise, splits);
  TAPS_FIELD(Depthwise, depth_of_split);
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
