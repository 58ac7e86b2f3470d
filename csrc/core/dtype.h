// The element types of the kernels. No torch here: the CUDA sources and the lanes of the CPU compile in a second.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TAPS_BOTH __host__ __device__
#else
#define TAPS_BOTH
#endif

namespace taps {

enum class Dtype : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

TAPS_BOTH constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace taps
