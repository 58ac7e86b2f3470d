// How a tile kernel is launched, with the shared memory that its loop needs.
#pragma once

#include "cuda/device.cuh"
#include "cuda/linear.cuh"

namespace taps::cuda {
namespace {

// Two blocks to a multiprocessor are enough; without saying so, ptxas aims for more and spills. Where the shared memory
// of one has no room for two, one may have all registers: in half of them the widest tiles spill on 12.0.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr unsigned kMostOfTwo = 49 * 1024;  // of 100 KiB, a block takes one more than it asks for
#else
constexpr unsigned kMostOfTwo = ~0u;
#endif

// The shared memory is in the kernel's name, for tools/ptxas_table.py.
template <class Args, class Body, unsigned kShared>
__global__ void __launch_bounds__(Body::Tile::kThreads, kShared <= kMostOfTwo ? 2 : 1) product(Args args) {
  Body::run(args);
}

template <class Body, class Args>
void launch(const Args& args, const dev::Grid& grid, cudaStream_t stream) {
  constexpr unsigned kShared = Body::Loop::kShared;
  // Each time that a thread's device changes: the attribute belongs to the context.
  static thread_local int prepared = -1;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  if (kShared > 48 * 1024 && prepared != device) {
    check(cudaFuncSetAttribute(product<Args, Body, kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kShared)),
          "shared memory of a gated product");
    prepared = device;
  }
  product<Args, Body, kShared><<<dim3(grid.tiles, grid.splits), Body::Tile::kThreads, kShared, stream>>>(args);
  check(cudaGetLastError(), "gated product");
}

}  // namespace
}  // namespace taps::cuda
