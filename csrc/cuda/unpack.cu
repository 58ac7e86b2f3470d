// Launches of unpack.cuh.
#include "cuda/device.cuh"
#include "cuda/unpack.cuh"

namespace taps::cuda {
namespace {

using dev::kBitmaskShared;
using dev::kCountShared;
using dev::kThreads;

// Room for four blocks, as in reconstruct.cu; the shared memory is in the name, as in linear.cu.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) unpack_codes(Unpack args, bool vectors) {
  dev::unpack_codes<T>(args, vectors);
}

template <unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4) count_bitmask(Unpack args) {
  dev::count_bitmask(args);
}

template <class T, unsigned kShared>
__global__ void __launch_bounds__(kThreads, 4) unpack_bitmask(Unpack args, bool vectors) {
  dev::unpack_bitmask<T>(args, vectors);
}

template <class T>
void launch(const Unpack& args, int device, cudaStream_t stream) {
  const bool vectors = dev::takes_vectors(args);
  if (args.delta.codec != Codec::kBitmask) {
    unpack_codes<T><<<dev::unpack_blocks(args, multiprocessors(device)), kThreads, 0, stream>>>(args, vectors);
    check(cudaGetLastError(), "unpack");
    return;
  }
  const auto chunks = static_cast<unsigned>(args.chunks());
  if (chunks > 1) {
    count_bitmask<kCountShared><<<chunks - 1, kThreads, kCountShared, stream>>>(args);
    check(cudaGetLastError(), "count of a bitmask");
  }
  unpack_bitmask<T, kBitmaskShared><<<chunks, kThreads, kBitmaskShared, stream>>>(args, vectors);
  check(cudaGetLastError(), "unpack of a bitmask");
}

}  // namespace

void unpack(const Unpack& args, int device, void* stream) {
  if (args.delta.numel() == 0) return;
  const DeviceGuard guard(device);
  if (args.in_double()) {
    launch<double>(args, device, static_cast<cudaStream_t>(stream));
  } else {
    launch<float>(args, device, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace taps::cuda
