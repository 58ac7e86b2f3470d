// Launches of the gated convolution's forward (conv2d.cuh).
#include "cuda/conv2d.cuh"
#include "cuda/launch.cuh"

namespace taps::cuda {
namespace {

template <class T>
void launch_compute(const Convolution& args, const dev::Grid& grid, cudaStream_t stream) {
  dev::with_convolution<T>(args, [&](auto instance) { launch<typename decltype(instance)::type>(args, grid, stream); });
}

}  // namespace

int64_t conv2d_bytes(const Convolution& args, int device) {
  return dev::plan(Product::kForward, args, {multiprocessors(device)}).bytes;
}

void conv2d(Convolution args, int device, void* stream) {
  const DeviceGuard guard(device);
  const dev::Grid grid = dev::plan(Product::kForward, args, {multiprocessors(device)});
  dev::set_grid(args, grid);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args.compute == Dtype::kBFloat16) {
    launch_compute<dev::bf16>(args, grid, queue);
  } else {
    launch_compute<dev::f16>(args, grid, queue);
  }
  if (grid.splits > 1) sum_splits(args, args.rows, args.outputs, queue);
}

}  // namespace taps::cuda
