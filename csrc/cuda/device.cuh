// What the launches share, on the host: errors, the current device, sums.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
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

// A number that each device is asked for once, because asking may take longer than a launch: threads that ask together
// hear the same. It is at least 0.
class Answers {
 public:
  template <class Ask>
  int of(int device, const Ask& ask) {
    std::atomic<int>& known = plus_one_.at(static_cast<size_t>(device));
    int answer = known.load(std::memory_order_relaxed) - 1;
    if (answer < 0) known.store((answer = ask()) + 1, std::memory_order_relaxed);
    return answer;
  }

 private:
  std::array<std::atomic<int>, 128> plus_one_{};  // torch knows no more devices
};

int multiprocessors(int device);
int capability(int device);  // the major number of its compute capability

// result = scale * the sum of `count` values, in a fixed order.
void add_up(const double* values, int64_t count, double scale, void* result, Dtype dtype, cudaStream_t stream);

// The product [rows, columns] of the partial sums that its splits left in `memory`, and its bias.
void sum_splits(const LinearProduct& args, int64_t rows, int64_t columns, cudaStream_t stream);

}  // namespace taps::cuda
