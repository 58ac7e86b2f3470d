// Launches of the gated linear layer's three products (linear.cuh): the type instances, shared memory, grids.
#include "cuda/device.cuh"
#include "cuda/elements.cuh"
#include "cuda/linear.cuh"

namespace taps::cuda {
namespace {

using dev::bf16;
using dev::f16;
using dev::kThreads;

// Two blocks to a multiprocessor are enough; without saying so, ptxas aims for more and spills. The shared memory is in
// the kernel's name, for tools/ptxas_table.py.
template <class Body, unsigned kShared>
__global__ void __launch_bounds__(Body::Tile::kThreads, 2) product(LinearProduct args) {
  Body::run(args);
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_splits(LinearProduct args, int64_t rows, int64_t columns) {
  dev::add_splits<T>(args, rows, columns);
}

template <class Body>
void launch(const LinearProduct& args, const dev::Grid& grid, cudaStream_t stream) {
  constexpr unsigned kShared = Body::Loop::kShared;
  // Once for each device: the attribute belongs to the context.
  static thread_local int prepared = -1;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  if (kShared > 48 * 1024 && prepared != device) {
    check(cudaFuncSetAttribute(product<Body, kShared>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kShared)),
          "shared memory of a gated product");
    prepared = device;
  }
  product<Body, kShared><<<dim3(grid.tiles, grid.splits), Body::Tile::kThreads, kShared, stream>>>(args);
  check(cudaGetLastError(), "gated product");
}

template <class T>
void launch_compute(Product kind, const LinearProduct& args, const dev::Grid& grid, cudaStream_t stream) {
  dev::with_instance<T>(kind, args,
                        [&](auto instance) { launch<typename decltype(instance)::type>(args, grid, stream); });
  if (grid.splits == 1) return;
  const int64_t columns = kind == Product::kForward ? args.outputs : args.inputs;
  const int64_t blocks = (args.rows * columns + kThreads - 1) / kThreads;
  add_splits<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, args.rows, columns);
  check(cudaGetLastError(), "sum over the splits");
}

}  // namespace

int64_t linear_bytes(Product kind, const LinearProduct& args, int device) {
  return dev::plan(kind, args, multiprocessors(device)).bytes;
}

void linear(Product kind, LinearProduct args, int device, void* stream) {
  const DeviceGuard guard(device);
  const dev::Grid grid = dev::plan(kind, args, multiprocessors(device));
  args.splits = static_cast<int>(grid.splits);
  args.depth_of_split = grid.depth_of_split;
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
