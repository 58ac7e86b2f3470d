// The few device primitives that the kernels share: typed loads and stores, the gate, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/gate.cuh"

namespace taps::cuda {

using dev::is_open;

void check(cudaError_t error, const char* what);  // raises with CUDA's own message

// Makes a device current for a scope, and the one before it afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  int device_;
};

int multiprocessors(int device);

// result = scale * the sum of `count` values, in a fixed order.
void add_up(const double* values, int64_t count, double scale, void* result, Dtype dtype, cudaStream_t stream);

// Kernels ask for room for four such blocks: left alone, ptxas aims for more and spills.
constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements per thread and step: one 16-byte access for 16-bit types

// Types are run-time values: the branches are uniform over the grid and the kernels wait for
// memory, so one kernel serves what would be 64 instances.
template <class T>
__device__ T load_one(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<T>(static_cast<const float*>(data)[at]);
    case Dtype::kFloat64:
      return static_cast<T>(static_cast<const double*>(data)[at]);
    case Dtype::kBFloat16:
      return static_cast<T>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]));
    default:
      return static_cast<T>(__half2float(static_cast<const __half*>(data)[at]));
  }
}

// fp64 narrows to 16 bits through fp32, as torch's own cast does.
template <class T>
__device__ void store_one(void* data, Dtype dtype, int64_t at, T value) {
  switch (dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(data)[at] = static_cast<float>(value);
      return;
    case Dtype::kFloat64:
      static_cast<double*>(data)[at] = static_cast<double>(value);
      return;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(static_cast<float>(value));
      return;
    default:
      static_cast<__half*>(data)[at] = __float2half_rn(static_cast<float>(value));
      return;
  }
}

// kVector elements from `at` on, which is a multiple of kVector; the data is 16-byte aligned.
template <class T>
__device__ void load_vector(const void* data, Dtype dtype, int64_t at, T (&to)[kVector]) {
  const char* bytes = static_cast<const char*>(data) + at * size_of(dtype);
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(bytes) + part);
      to[4 * part] = static_cast<T>(v.x);
      to[4 * part + 1] = static_cast<T>(v.y);
      to[4 * part + 2] = static_cast<T>(v.z);
      to[4 * part + 3] = static_cast<T>(v.w);
    }
  } else if (dtype == Dtype::kFloat64) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const double2 v = __ldcs(reinterpret_cast<const double2*>(bytes) + part);
      to[2 * part] = static_cast<T>(v.x);
      to[2 * part + 1] = static_cast<T>(v.y);
    }
  } else {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(bytes));
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      to[i] = static_cast<T>(dtype == Dtype::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(half) << 16)
                                                       : __half2float(__ushort_as_half(half)));
    }
  }
}

template <class T>
__device__ void store_vector(void* data, Dtype dtype, int64_t at, const T (&from)[kVector]) {
  char* bytes = static_cast<char*>(data) + at * size_of(dtype);
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      reinterpret_cast<float4*>(bytes)[part] =
          make_float4(static_cast<float>(from[4 * part]), static_cast<float>(from[4 * part + 1]),
                      static_cast<float>(from[4 * part + 2]), static_cast<float>(from[4 * part + 3]));
    }
  } else if (dtype == Dtype::kFloat64) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      reinterpret_cast<double2*>(bytes)[part] =
          make_double2(static_cast<double>(from[2 * part]), static_cast<double>(from[2 * part + 1]));
    }
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = static_cast<float>(from[i]);
      const uint32_t half = dtype == Dtype::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                                      : __half_as_ushort(__float2half_rn(value));
      words[i / 2] |= half << (i % 2 * 16);
    }
    *reinterpret_cast<uint4*>(bytes) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Where each operand's element `index` lies, counted in a walk's own order.
template <int N>
__device__ void offsets_of(const Walk<N>& walk, int64_t index, int64_t (&offset)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) offset[k] = 0;
  for (int dim = walk.ndim - 1; dim >= 0; --dim) {
    const int64_t position = index % walk.sizes[dim];
    index /= walk.sizes[dim];
#pragma unroll
    for (int k = 0; k < N; ++k) offset[k] += position * walk.strides[k][dim];
  }
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace taps::cuda
