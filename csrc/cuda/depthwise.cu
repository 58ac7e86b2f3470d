// Launches of depthwise.cuh.
#include "cuda/depthwise.cuh"
#include "cuda/device.cuh"

namespace taps::cuda {
namespace {

using dev::kThreads;

// Room for two blocks; the shared memory is in the name, as in linear.cu.
template <class Body, unsigned kShared>
__global__ void __launch_bounds__(kThreads, 2) depthwise_product(Depthwise args) {
  Body::run(args);
}

template <unsigned kShared>
__global__ void __launch_bounds__(kThreads) depthwise_settle(Depthwise args) {
  dev::settle_depthwise(args);
}

template <class T>
void launch(Product product, const Depthwise& args, const dev::DepthwiseGrid& grid, cudaStream_t stream) {
  dev::with_depthwise<T>(product, args, [&](auto instance) {
    using Body = typename decltype(instance)::type;
    depthwise_product<Body, Body::kShared><<<dim3(grid.groups, grid.splits), kThreads, Body::kShared, stream>>>(args);
  });
  check(cudaGetLastError(), "depthwise convolution");
}

}  // namespace

int64_t depthwise_bytes(Product product, const Depthwise& args, int device) {
  return dev::plan(product, args, multiprocessors(device)).bytes;
}

void depthwise(Product product, Depthwise args, int device, void* stream) {
  const DeviceGuard guard(device);
  const dev::DepthwiseGrid grid = dev::plan(product, args, multiprocessors(device));
  dev::set_grid(args, grid);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args.compute == Dtype::kBFloat16) {
    launch<dev::bf16>(product, args, grid, queue);
  } else if (args.compute == Dtype::kFloat16) {
    launch<dev::f16>(product, args, grid, queue);
  } else {
    launch<float>(product, args, grid, queue);
  }
  if (product != Product::kWeightGradient) return;
  const auto blocks = static_cast<unsigned>(dev::settling_blocks(args));
  depthwise_settle<dev::kSettleShared><<<blocks, kThreads, dev::kSettleShared, queue>>>(args);
  check(cudaGetLastError(), "gradients of a depthwise convolution");
  if (args.score_gradient) {
    add_up(static_cast<const double*>(args.memory), blocks, args.scale, args.score_gradient, args.score_dtype, queue);
  }
}

}  // namespace taps::cuda
