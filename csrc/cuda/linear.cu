// Launches of the gated linear layer's three products (linear.cuh): the type instances and grids.
#include "core/choose.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear.cuh"

namespace taps::cuda {
namespace {

using dev::bf16;
using dev::f16;
using dev::kThreads;

template <class T>
__global__ void __launch_bounds__(kThreads) add_splits(LinearProduct args, int64_t rows, int64_t columns) {
  dev::add_splits<T>(args, rows, columns);
}

// The product whose blocks take the most room.
using Widest = dev::Forward<dev::Wide<128, float>, bf16, bf16, float>;

// How many of its blocks a cluster may have on a device, and so those of any product; 0 where the device, or the code
// that it has loaded, has no clusters. A slice of a device (MIG) may have room for fewer than eight.
int most_of_cluster(int device) {
  static Answers answers;
  return answers.of(device, [&] {
    constexpr unsigned kShared = Widest::Loop::kShared;
    const auto kernel = clustered_product<LinearProduct, Widest, kShared>;
    const DeviceGuard guard(device);
    cudaFuncAttributes loaded{};
    check(cudaFuncGetAttributes(&loaded, kernel), "attributes of a gated product");
    if (!has_clusters(capability(device), loaded.ptxVersion)) return 0;
    allow_shared(kernel, kShared);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, dev::kMostOfCluster), config.blockDim = dim3(Widest::Tile::kThreads);
    config.dynamicSmemBytes = kShared;
    int most = 0;
    check(cudaOccupancyMaxPotentialClusterSize(&most, kernel, &config), "blocks of a cluster");
    return std::min(most, static_cast<int>(dev::kMostOfCluster));
  });
}

template <class T>
void launch_compute(Product kind, const LinearProduct& args, const dev::Grid& grid, cudaStream_t stream) {
  dev::with_instance<T>(kind, args, grid.kind, [&](auto instance) {
    using Body = typename decltype(instance)::type;
    if constexpr (dev::kHasCluster<Body>) {
      static_assert(Body::Loop::kShared <= Widest::Loop::kShared && Body::Tile::kThreads <= Widest::Tile::kThreads,
                    "a cluster of these has room where one of the widest has");
    }
    launch<Body>(args, grid, stream);
  });
  if (grid.splits > 1 && !grid.clustered)
    sum_splits(args, args.rows, kind == Product::kForward ? args.outputs : args.inputs, stream);
}

}  // namespace

void sum_splits(const LinearProduct& args, int64_t rows, int64_t columns, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((rows * columns + kThreads - 1) / kThreads);
  if (args.compute == Dtype::kBFloat16) {
    add_splits<bf16><<<blocks, kThreads, 0, stream>>>(args, rows, columns);
  } else {
    add_splits<f16><<<blocks, kThreads, 0, stream>>>(args, rows, columns);
  }
  check(cudaGetLastError(), "sum over the splits");
}

LinearPlan plan_linear(Product kind, const LinearProduct& args, int device) {
  const int most = most_of_cluster(device), chosen = chosen_adding(most) == Adding::kCluster ? most : 0;
  return {dev::plan(kind, args, {multiprocessors(device), chosen}).bytes, chosen};
}

void linear(Product kind, LinearProduct args, const LinearPlan& planned, int device, void* stream) {
  const DeviceGuard guard(device);
  const dev::Grid grid = dev::plan(kind, args, {multiprocessors(device), planned.most_of_cluster});
  dev::set_grid(args, grid);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (grid.tiles > 0) {
    if (args.compute == Dtype::kBFloat16) {
      launch_compute<bf16>(kind, args, grid, queue);
    } else {
      launch_compute<f16>(kind, args, grid, queue);
    }
  }
  if (kind == Product::kWeightGradient && args.score_gradient) {
    add_up(static_cast<const double*>(args.memory), grid.tiles, args.scale, args.score_gradient, args.score_dtype,
           queue);
  }
}

}  // namespace taps::cuda
