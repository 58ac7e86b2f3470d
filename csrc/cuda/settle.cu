// Launches of settle.cuh.
#include "cuda/device.cuh"
#include "cuda/settle.cuh"

namespace taps::cuda {
namespace {

using dev::kDotShared;
using dev::kThreads;

// Room for four blocks, as in reconstruct.cu; the shared memory is in the name, as in linear.cu.
template <class T, unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4) settle_chunks(const __grid_constant__ ForeachSettle args) {
  dev::foreach_settle<T>(args);
}

template <unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4) settle_scores(const __grid_constant__ ForeachSettle args) {
  dev::foreach_finish(args);
}

}  // namespace

void foreach_settle(ForeachSettle args, int device, void* stream) {
  const unsigned blocks = dev::plan_foreach(args);
  if (args.count == 0) return;
  const DeviceGuard guard(device);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (blocks > 0) {
    if (args.items[0].in_double()) {
      settle_chunks<double, kDotShared><<<blocks, kThreads, kDotShared, queue>>>(args);
    } else {
      settle_chunks<float, kDotShared><<<blocks, kThreads, kDotShared, queue>>>(args);
    }
    check(cudaGetLastError(), "foreach settle");
  }
  if (!args.scores()) return;
  settle_scores<kDotShared><<<static_cast<unsigned>(args.count), kThreads, kDotShared, queue>>>(args);
  check(cudaGetLastError(), "foreach settle, scores");
}

}  // namespace taps::cuda
