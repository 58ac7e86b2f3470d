// The one door to CUDA for code that runs on both devices.
#pragma once

#include <stdexcept>

#include "kernels.h"

namespace taps::cuda {

#ifdef TAPS_WITH_CUDA

void* current_stream(int device);

#else

[[noreturn]] inline void absent() {
  throw std::runtime_error(
      "taps_ext was built without its CUDA kernels (TAPS_CUDA=OFF, or no toolkit was found); "
      "build it with TAPS_CUDA=ON to use tensors on a GPU");
}
inline void* current_stream(int) { absent(); }
#ifndef TAPS_WITH_TWIN
inline void reconstruct(const Reconstruct&, int, void*) { absent(); }
inline void foreach_reconstruct(const ForeachReconstruct&, int, void*) { absent(); }
inline void foreach_settle(const ForeachSettle&, int, void*) { absent(); }
inline void unpack(const Unpack&, int, void*) { absent(); }
inline void dot(const Dot&, int, void*) { absent(); }
inline LinearPlan plan_linear(Product, const LinearProduct&, int) { absent(); }
inline void linear(Product, const LinearProduct&, const LinearPlan&, int, void*) { absent(); }
inline int64_t mixed_bytes(const MixedBatch&) { absent(); }
inline void mixed_order(MixedBatch&, int, void*) { absent(); }
inline void mixed(Product, const MixedBatch&, int, void*) { absent(); }
inline void spoil(const Spoil&, int, void*) { absent(); }
inline int64_t conv2d_bytes(const Convolution&, int) { absent(); }
inline void conv2d(const Convolution&, int, void*) { absent(); }
inline int64_t depthwise_bytes(Product, const Depthwise&, int) { absent(); }
inline void depthwise(Product, const Depthwise&, int, void*) { absent(); }
#endif

#endif

#ifdef TAPS_WITH_TWIN
constexpr bool kTwin = true;
#else
constexpr bool kTwin = false;
#endif

// Whether device kernels run there: on a GPU, and in the twin's build everywhere.
constexpr bool runs(bool on_cuda) { return on_cuda || kTwin; }

}  // namespace taps::cuda
