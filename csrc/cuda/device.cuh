// What the launches share, on the host: errors, the current device, sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace taps::cuda {

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
int capability(int device);  // the major number of its compute capability

// result = scale * the sum of `count` values, in a fixed order.
void add_up(const double* values, int64_t count, double scale, void* result, Dtype dtype, cudaStream_t stream);

// The product [rows, columns] of the partial sums that its splits left in `memory`, and its bias.
void sum_splits(const LinearProduct& args, int64_t rows, int64_t columns, cudaStream_t stream);

}  // namespace taps::cuda
