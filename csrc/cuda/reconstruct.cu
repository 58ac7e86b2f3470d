// W_t = W + g * Delta on the GPU. Bound by memory: 16-byte accesses, a grid-stride loop, a
// predicated tail. The closed branch never touches the delta.
#include <algorithm>

#include "cuda/device.cuh"

namespace taps::cuda {
namespace {

template <class T>
__device__ T combine(const Reconstruct& args, bool open, T weight, T delta, T scale) {
  const T sum = args.weight ? (open ? weight + delta : weight) : (open ? delta : T(0));
  return scale == T(1) ? sum : sum * scale;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) reconstruct_flat(Reconstruct args, bool vectors) {
  const bool open = args.delta && is_open(args.gate);
  const T scale = static_cast<T>(args.scale);
  const int64_t n = args.walk.numel;
  const int64_t whole = vectors ? n / kVector : 0;
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = first; i < whole; i += step) {
    T weight[kVector] = {}, delta[kVector] = {}, out[kVector];
    if (args.weight) load_vector(args.weight, args.weight_dtype, i * kVector, weight);
    if (open) load_vector(args.delta, args.delta_dtype, i * kVector, delta);
#pragma unroll
    for (int k = 0; k < kVector; ++k) out[k] = combine(args, open, weight[k], delta[k], scale);
    store_vector(args.out, args.out_dtype, i * kVector, out);
  }
  for (int64_t i = whole * kVector + first; i < n; i += step) {  // tail, or misaligned operands
    const T weight = args.weight ? load_one<T>(args.weight, args.weight_dtype, i) : T(0);
    const T delta = open ? load_one<T>(args.delta, args.delta_dtype, i) : T(0);
    store_one(args.out, args.out_dtype, i, combine(args, open, weight, delta, scale));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) reconstruct_strided(Reconstruct args) {
  const bool open = args.delta && is_open(args.gate);
  const T scale = static_cast<T>(args.scale);
  const int64_t step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < args.walk.numel; i += step) {
    int64_t at[3];
    offsets_of(args.walk, i, at);
    const T weight = args.weight ? load_one<T>(args.weight, args.weight_dtype, at[1]) : T(0);
    const T delta = open ? load_one<T>(args.delta, args.delta_dtype, at[2]) : T(0);
    store_one(args.out, args.out_dtype, at[0], combine(args, open, weight, delta, scale));
  }
}

template <class T>
void launch(const Reconstruct& args, int device, cudaStream_t stream) {
  const bool flat = args.walk.flat();
  const bool vectors = aligned(args.out) && aligned(args.weight) && aligned(args.delta);
  const int64_t per_block = static_cast<int64_t>(kThreads) * (flat && vectors ? kVector : 1);
  const int64_t wanted = (args.walk.numel + per_block - 1) / per_block;
  // Eight blocks of 256 threads are all that a multiprocessor holds; more would only queue.
  const int64_t limit = 8 * static_cast<int64_t>(multiprocessors(device));
  const unsigned blocks = static_cast<unsigned>(std::min(wanted, limit));
  if (flat) {
    reconstruct_flat<T><<<blocks, kThreads, 0, stream>>>(args, vectors);
  } else {
    reconstruct_strided<T><<<blocks, kThreads, 0, stream>>>(args);
  }
  check(cudaGetLastError(), "reconstruct");
}

}  // namespace

void reconstruct(const Reconstruct& args, int device, void* stream) {
  if (args.walk.numel == 0) return;
  const DeviceGuard guard(device);
  if (args.in_double()) {
    launch<double>(args, device, static_cast<cudaStream_t>(stream));
  } else {
    launch<float>(args, device, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace taps::cuda
