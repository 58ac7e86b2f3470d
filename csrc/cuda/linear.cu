// Launches of the gated linear layer's three products (linear.cuh): the type instances and grids.
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

template <class T>
void launch_compute(Product kind, const LinearProduct& args, const dev::Grid& grid, cudaStream_t stream) {
  dev::with_instance<T>(kind, args, grid.kind,
                        [&](auto instance) { launch<typename decltype(instance)::type>(args, grid, stream); });
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

int64_t linear_bytes(Product kind, const LinearProduct& args, int device) {
  return dev::plan(kind, args, processors(device)).bytes;
}

void linear(Product kind, LinearProduct args, int device, void* stream) {
  const DeviceGuard guard(device);
  const dev::Grid grid = dev::plan(kind, args, processors(device));
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
