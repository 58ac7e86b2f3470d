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

// The same, of which the blocks of a tile's splits are a cluster. Code for less than 9.0 has none and is not to be
// asked (linear.cu): it stops, because without a result nobody would know.
template <class Args, class Body, unsigned kShared>
__global__ void __launch_bounds__(Body::Tile::kThreads, kShared <= kMostOfTwo ? 2 : 1) clustered_product(Args args) {
  if constexpr (dev::kClusters) {
    Body::run_in_cluster(args);
  } else {
    dev::trap();
  }
}

template <class Kernel>
void allow_shared(Kernel* kernel, unsigned bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "shared memory of a gated product");
}

template <class Body, class Args>
void launch(const Args& args, const dev::Grid& grid, cudaStream_t stream) {
  constexpr unsigned kShared = Body::Loop::kShared;
  // Each time that a thread's device changes: the attribute belongs to the context.
  static thread_local int prepared = -1;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  if (kShared > 48 * 1024 && prepared != device) {
    allow_shared(product<Args, Body, kShared>, kShared);
    if constexpr (dev::kHasCluster<Body>) allow_shared(clustered_product<Args, Body, kShared>, kShared);
    prepared = device;
  }
  const dim3 blocks(grid.tiles, grid.splits), threads(Body::Tile::kThreads);
  if constexpr (dev::kHasCluster<Body>) {
    if (grid.clustered) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {1, grid.splits, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = kShared, config.stream = stream;
      config.attrs = &cluster, config.numAttrs = 1;
      check(cudaLaunchKernelEx(&config, clustered_product<Args, Body, kShared>, args), "gated product in clusters");
      return;
    }
  }
  product<Args, Body, kShared><<<blocks, threads, kShared, stream>>>(args);
  check(cudaGetLastError(), "gated product");
}

}  // namespace
}  // namespace taps::cuda
