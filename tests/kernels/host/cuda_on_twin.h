// What tests/cuda/conformance.cu asks of the CUDA runtime, on the twin: a device of compute capability 9.0. Its memory
// is the host's, in allocations of exactly their size; a finding is an error of the launch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "check.h"
#include "cuda/primitives.cuh"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaFound };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned across = 1, unsigned down = 1, unsigned deep = 1) : x(across), y(down), z(deep) {}
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    twin::Dim clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "the twin found what is above"; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 9, cudaSuccess; }
// Gives back what was freed last of that size, with what is in it, as a device does.
struct Freed {
  std::map<void*, std::size_t> sizes;
  std::map<std::size_t, std::vector<void*>> places;
  ~Freed() {
    for (const auto& [place, bytes] : sizes) std::free(place);
  }
};
inline Freed& freed() {
  static Freed all;
  return all;
}
template <class E>
cudaError_t cudaMalloc(E** place, std::size_t bytes) {
  std::vector<void*>& there = freed().places[bytes];
  if (there.empty()) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes) != 0) std::abort();
    freed().sizes[memory] = bytes;
    there.push_back(memory);
  }
  *place = static_cast<E*>(there.back());
  there.pop_back();
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* place) {
  freed().places[freed().sizes.at(place)].push_back(place);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int byte, std::size_t bytes) {
  return std::memset(to, byte, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* most, Kernel*, const cudaLaunchConfig_t*) {
  return *most = static_cast<int>(taps::dev::kMostOfCluster), cudaSuccess;
}
template <class... Of>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Of...), const Of&... args) {
  const dim3& grid = config->gridDim;
  const auto found = twin::launch(
      {grid.x, grid.y, grid.z}, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(args...); }, 0,
      config->numAttrs > 0 ? config->attrs->val.clusterDim : twin::Dim());
  if (!found.empty()) std::printf("%s\n", host::shown(found).c_str());
  return found.empty() ? cudaSuccess : cudaFound;
}

inline taps::dev::bf16 __float2bfloat16_rn(float x) { return taps::dev::from_f32<taps::dev::bf16>(x); }
inline taps::dev::f16 __float2half_rn(float x) { return taps::dev::from_f32<taps::dev::f16>(x); }
inline uint16_t __bfloat16_as_ushort(taps::dev::bf16 x) { return x.bits; }
inline uint16_t __half_as_ushort(taps::dev::f16 x) { return x.bits; }
inline taps::dev::bf16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline taps::dev::f16 __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __bfloat162float(taps::dev::bf16 x) { return taps::dev::to_f32(x); }
inline float __half2float(taps::dev::f16 x) { return taps::dev::to_f32(x); }
