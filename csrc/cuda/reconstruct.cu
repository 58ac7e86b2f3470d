// Launches of reconstruct.cuh.
#include "cuda/device.cuh"
#include "cuda/reconstruct.cuh"

namespace taps::cuda {
namespace {

using dev::kThreads;

// Kernels ask for room for four such blocks: left alone, ptxas aims for more and spills.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) reconstruct_flat(Reconstruct args, bool vectors) {
  dev::reconstruct_flat<T>(args, vectors);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) reconstruct_strided(Reconstruct args) {
  dev::reconstruct_strided<T>(args);
}

// Items are picked by a run-time index: the arguments stay in constant memory.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) foreach_chunks(const __grid_constant__ ForeachReconstruct args) {
  dev::foreach_reconstruct<T>(args);
}

template <class T>
void launch(const Reconstruct& args, int device, cudaStream_t stream) {
  const unsigned blocks = dev::reconstruct_blocks(args, multiprocessors(device));
  if (args.walk.flat()) {
    reconstruct_flat<T><<<blocks, kThreads, 0, stream>>>(args, dev::takes_vectors(args));
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

void foreach_reconstruct(ForeachReconstruct args, int device, void* stream) {
  const unsigned blocks = dev::plan_foreach(args);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args.items[0].in_double()) {
    foreach_chunks<double><<<blocks, kThreads, 0, queue>>>(args);
  } else {
    foreach_chunks<float><<<blocks, kThreads, 0, queue>>>(args);
  }
  check(cudaGetLastError(), "foreach reconstruct");
}

}  // namespace taps::cuda
