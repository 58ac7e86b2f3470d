// Launches of the products of a mixed batch (mixed.cuh).
#include "cuda/device.cuh"
#include "cuda/mixed.cuh"

namespace taps::cuda {
namespace {

using dev::kDotShared;
using dev::kOrderShared;
using dev::kThreads;

// The shared memory is in a kernel's name, as in launch.cuh.
template <unsigned kShared>
__global__ void __launch_bounds__(kThreads) order_samples(const __grid_constant__ MixedBatch args) {
  dev::order_samples(args);
}

template <class Body, unsigned kShared>
__global__ void __launch_bounds__(Body::Tile::kThreads, 2) mixed_product(const __grid_constant__ MixedBatch args) {
  Body::run(args);
}

template <unsigned kShared>
__global__ void __launch_bounds__(kThreads) mixed_scores(const __grid_constant__ MixedBatch args, int64_t count) {
  dev::mixed_scores(args, count);
}

__global__ void __launch_bounds__(kThreads) spoil_samples(Spoil args) { dev::spoil_sample(args); }

template <class Body>
void launch_mixed(const MixedBatch& args, const dev::Grid& grid, cudaStream_t stream) {
  constexpr unsigned kShared = Body::Loop::kShared;
  static thread_local int prepared = -1;  // as in launch.cuh
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  if (kShared > 48 * 1024 && prepared != device) {
    check(cudaFuncSetAttribute(mixed_product<Body, kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kShared)),
          "shared memory of a mixed batch");
    prepared = device;
  }
  mixed_product<Body, kShared><<<dim3(grid.tiles, grid.splits), Body::Tile::kThreads, kShared, stream>>>(args);
  check(cudaGetLastError(), "product of a mixed batch");
}

}  // namespace

int64_t mixed_bytes(const MixedBatch& args) {
  MixedBatch sized = args;
  sized.product.memory = nullptr;
  return dev::mixed_parts(sized);
}

void mixed_order(MixedBatch& args, int device, void* stream) {
  const DeviceGuard guard(device);
  dev::mixed_parts(args);
  order_samples<kOrderShared><<<1, kThreads, kOrderShared, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), "order of a mixed batch");
}

void mixed(Product product, const MixedBatch& args, int device, void* stream) {
  const dev::Grid grid = product == Product::kWeightGradient ? dev::mixed_grid<dev::WeightTile>(product, args)
                                                             : dev::mixed_grid<dev::MoreRows>(product, args);
  if (grid.tiles == 0 || grid.splits == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const auto run = [&](auto instance) { launch_mixed<typename decltype(instance)::type>(args, grid, queue); };
  if (args.product.compute == Dtype::kBFloat16) {
    dev::with_mixed<dev::bf16>(product, args.product, run);
  } else {
    dev::with_mixed<dev::f16>(product, args.product, run);
  }
  if (product != Product::kWeightGradient || !args.partials) return;
  mixed_scores<kDotShared>
      <<<static_cast<unsigned>(args.count), kThreads, kDotShared, queue>>>(args, static_cast<int64_t>(grid.tiles));
  check(cudaGetLastError(), "scores of a mixed batch");
}

void spoil(const Spoil& args, int device, void* stream) {
  if (args.samples == 0) return;
  const DeviceGuard guard(device);
  spoil_samples<<<static_cast<unsigned>(args.samples), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), "samples of no task");
}

}  // namespace taps::cuda
