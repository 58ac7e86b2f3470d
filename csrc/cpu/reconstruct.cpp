// W_t = W + g * Delta on the CPU: splits the walk over threads, the lanes do the arithmetic.
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace taps::cpu {
namespace {

const void* advance(const void* data, Dtype dtype, int64_t elements) {
  return data ? static_cast<const char*>(data) + elements * size_of(dtype) : nullptr;
}

}  // namespace

void reconstruct(const Reconstruct& args) {
  const Walk<3>& walk = args.walk;
  if (walk.numel == 0) return;
  const void* delta = args.gate.open ? args.delta : nullptr;  // closed: not a byte of it is read
  const bool in_double = args.in_double();
  const Lanes& set = lanes();

  const auto run = [&](int64_t out_at, int64_t weight_at, int64_t delta_at, int64_t out_stride, int64_t weight_stride,
                       int64_t delta_stride, int64_t n) {
    set.reconstruct(static_cast<char*>(args.out) + out_at * size_of(args.out_dtype), args.out_dtype, out_stride,
                    {advance(args.weight, args.weight_dtype, weight_at), args.weight_dtype, weight_stride},
                    {advance(delta, args.delta_dtype, delta_at), args.delta_dtype, delta_stride}, args.scale, in_double,
                    n);
  };

  if (walk.flat()) {
    parallel_for(walk.numel, kGrain,
                 [&](int64_t begin, int64_t end) { run(begin, begin, begin, 1, 1, 1, end - begin); });
    return;
  }
  const int last = walk.ndim - 1;
  const int64_t inner = walk.sizes[last];
  const int64_t grain = inner >= kGrain ? 1 : kGrain / inner;
  parallel_for(walk.numel / inner, grain, [&](int64_t begin, int64_t end) {
    for_rows<Walk<3>, 3>(walk, begin, end, [&](int64_t, const int64_t* at) {
      run(at[0], at[1], at[2], walk.strides[0][last], walk.strides[1][last], walk.strides[2][last], inner);
    });
  });
}

bool all_finite(const Walk<1>& walk, const void* data, Dtype dtype) {
  if (walk.numel == 0) return true;
  if (walk.flat()) return lanes().all_finite({data, dtype, 1}, walk.numel);
  const int last = walk.ndim - 1;
  bool finite = true;
  for_rows<Walk<1>, 1>(walk, 0, walk.numel / walk.sizes[last], [&](int64_t, const int64_t* at) {
    finite =
        finite && lanes().all_finite({advance(data, dtype, at[0]), dtype, walk.strides[0][last]}, walk.sizes[last]);
  });
  return finite;
}

}  // namespace taps::cpu
