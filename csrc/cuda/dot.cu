// Launches of dot.cuh.
#include "cuda/device.cuh"
#include "cuda/dot.cuh"

namespace taps::cuda {
namespace {

using dev::kDotShared;
using dev::kThreads;

// Room for four blocks, as in reconstruct.cu; the shared memory is in the name, as in linear.cu.
template <class T, unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4) dot_flat(Dot args, bool vectors) {
  dev::dot_flat<T>(args, vectors);
}

template <unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4) dot_strided(Dot args, int64_t per_chunk) {
  dev::dot_strided(args, per_chunk);
}

template <unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4)
    dot_finish(const double* values, int64_t count, double scale, void* result, Dtype dtype) {
  dev::dot_finish(values, count, scale, result, dtype);
}

}  // namespace

void add_up(const double* values, int64_t count, double scale, void* result, Dtype dtype, cudaStream_t stream) {
  dot_finish<kDotShared><<<1, kThreads, kDotShared, stream>>>(values, count, scale, result, dtype);
  check(cudaGetLastError(), "sum");
}

void dot(const Dot& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const int64_t chunks = dot_chunks(args.walk);
  if (chunks > 0) {
    const bool vectors = dev::aligned(args.a) && dev::aligned(args.b);
    const unsigned blocks = static_cast<unsigned>(chunks);
    if (!args.walk.flat()) {
      dot_strided<kDotShared><<<blocks, kThreads, kDotShared, queue>>>(args, (args.walk.numel + chunks - 1) / chunks);
    } else if (args.a_dtype == Dtype::kFloat64 || args.b_dtype == Dtype::kFloat64) {
      dot_flat<double, kDotShared><<<blocks, kThreads, kDotShared, queue>>>(args, vectors);
    } else {
      dot_flat<float, kDotShared><<<blocks, kThreads, kDotShared, queue>>>(args, vectors);
    }
    check(cudaGetLastError(), "dot");
  }
  add_up(args.partials, chunks, args.scale, args.result, args.result_dtype, queue);
}

}  // namespace taps::cuda
