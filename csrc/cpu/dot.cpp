// The fixed-order dot product on the CPU: one partial sum per chunk, chunks added in sequence, so
// the result does not depend on the number of threads.
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace taps::cpu {
namespace {

// Pairwise over the 16 running sums of a chunk.
double fold(double* sums) {
  for (int width = kDotSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

Run at(const void* data, Dtype dtype, int64_t elements, int64_t stride) {
  return {static_cast<const char*>(data) + elements * size_of(dtype), dtype, stride};
}

}  // namespace

void dot(const Dot& args) {
  const Walk<2>& walk = args.walk;
  const Lanes& set = lanes();
  const int64_t chunks = dot_chunks(walk);
  const bool flat = walk.flat();
  const int last = walk.ndim - 1;
  const int64_t inner = flat || walk.numel == 0 ? 1 : walk.sizes[last];
  const int64_t rows = walk.numel / inner;
  const int64_t per_chunk = flat ? kDotChunk : dot_rows_per_chunk(walk);

  parallel_for(chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double sums[kDotSums] = {};
      const int64_t from = chunk * per_chunk;
      const int64_t to = from + per_chunk < rows ? from + per_chunk : rows;
      if (flat) {
        set.dot(at(args.a, args.a_dtype, from, 1), at(args.b, args.b_dtype, from, 1), to - from, sums);
      } else {
        for_rows<Walk<2>, 2>(walk, from, to, [&](int64_t, const int64_t* offset) {
          set.dot(at(args.a, args.a_dtype, offset[0], walk.strides[0][last]),
                  at(args.b, args.b_dtype, offset[1], walk.strides[1][last]), inner, sums);
        });
      }
      args.partials[chunk] = fold(sums);
    }
  });

  double total = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += args.partials[chunk];
  total *= args.scale;
  if (args.result_dtype == Dtype::kFloat64) {
    *static_cast<double*>(args.result) = total;
  } else {
    *static_cast<float*>(args.result) = static_cast<float>(total);
  }
}

}  // namespace taps::cpu
