// The fixed-order dot product on the GPU: one block and one partial sum per chunk, then one block
// over the partial sums. No atomics; the same bits every time.
#include "cuda/device.cuh"

namespace taps::cuda {
namespace {

// The sum over a block in a fixed tree; valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  __syncthreads();
#pragma unroll
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  return sums[0];
}

// T is what the operands are read as; products and sums are fp64 either way.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) dot_flat(Dot args, bool vectors) {
  const int64_t begin = blockIdx.x * kDotChunk;
  const int64_t end = min(begin + kDotChunk, args.walk.numel);
  double sum = 0.0;
  int64_t done = begin;
  if (vectors) {  // kDotChunk is a multiple of kVector, so every vector is aligned
    const int64_t whole = (end - begin) / kVector;
    for (int64_t i = threadIdx.x; i < whole; i += kThreads) {
      T a[kVector], b[kVector];
      load_vector(args.a, args.a_dtype, begin + i * kVector, a);
      load_vector(args.b, args.b_dtype, begin + i * kVector, b);
#pragma unroll
      for (int k = 0; k < kVector; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
    }
    done = begin + whole * kVector;
  }
  for (int64_t i = done + threadIdx.x; i < end; i += kThreads) {  // tail, or misaligned operands
    sum += static_cast<double>(load_one<T>(args.a, args.a_dtype, i)) *
           static_cast<double>(load_one<T>(args.b, args.b_dtype, i));
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) args.partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads, 4) dot_strided(Dot args, int64_t per_chunk) {
  const int64_t begin = blockIdx.x * per_chunk;
  const int64_t end = min(begin + per_chunk, args.walk.numel);
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    int64_t at[2];
    offsets_of(args.walk, i, at);
    sum += load_one<double>(args.a, args.a_dtype, at[0]) * load_one<double>(args.b, args.b_dtype, at[1]);
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) args.partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads, 4)
    dot_finish(const double* partials, int64_t chunks, double scale, void* result, Dtype dtype) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partials[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) store_one(result, dtype, 0, total * scale);
}

}  // namespace

void add_up(const double* values, int64_t count, double scale, void* result, Dtype dtype, cudaStream_t stream) {
  dot_finish<<<1, kThreads, 0, stream>>>(values, count, scale, result, dtype);
  check(cudaGetLastError(), "sum");
}

void dot(const Dot& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const int64_t chunks = dot_chunks(args.walk);
  if (chunks > 0) {
    const bool vectors = aligned(args.a) && aligned(args.b);
    const unsigned blocks = static_cast<unsigned>(chunks);
    if (!args.walk.flat()) {
      dot_strided<<<blocks, kThreads, 0, queue>>>(args, (args.walk.numel + chunks - 1) / chunks);
    } else if (args.a_dtype == Dtype::kFloat64 || args.b_dtype == Dtype::kFloat64) {
      dot_flat<double><<<blocks, kThreads, 0, queue>>>(args, vectors);
    } else {
      dot_flat<float><<<blocks, kThreads, 0, queue>>>(args, vectors);
    }
    check(cudaGetLastError(), "dot");
  }
  add_up(args.partials, chunks, args.scale, args.result, args.result_dtype, queue);
}

}  // namespace taps::cuda
