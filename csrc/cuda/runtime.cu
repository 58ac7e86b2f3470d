// The CUDA runtime: torch's current stream, device scope, errors.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "core/device.h"
#include "cuda/device.cuh"

namespace taps::cuda {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
  }
}

DeviceGuard::DeviceGuard(int device) : before_(device), device_(device) {
  check(cudaGetDevice(&before_), "current device");
  if (before_ != device_) check(cudaSetDevice(device_), "device");
}

DeviceGuard::~DeviceGuard() {
  if (before_ != device_) cudaSetDevice(before_);
}

namespace {

int attribute(Answers& answers, cudaDeviceAttr which, int device) {
  return answers.of(device, [&] {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
    return value;
  });
}

}  // namespace

int multiprocessors(int device) {
  static Answers answers;
  return attribute(answers, cudaDevAttrMultiProcessorCount, device);
}

int capability(int device) {
  static Answers answers;
  return attribute(answers, cudaDevAttrComputeCapabilityMajor, device);
}

// Every CUDA libtorch exports this function and no CPU-only one does, so it is looked up instead
// of linked; a tensor on a GPU means that the library is loaded.
void* current_stream(int device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  if (!getter || getter(device, &stream) != 0) {
    throw std::runtime_error("torch's current CUDA stream is not available: expected a CUDA build of torch");
  }
  return stream;
}

}  // namespace taps::cuda
