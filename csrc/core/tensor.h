// The little of torch that this project uses, through the LibTorch stable ABI: described tensors,
// dispatcher calls that keep aten's error message, allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/dtype.h"

namespace taps {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Span = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The message of the error that libtorch just reported, where this libtorch (2.13 on) tells it.
std::string last_torch_error();

inline void check_torch(AOTITorchError code, const char* what) {
  if (code != TORCH_SUCCESS) fail(what, " failed", last_torch_error());
}

// --- dispatcher calls ---------------------------------------------------------------------------

template <size_t kReturns, class... Args>
auto call_many(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, (sizeof...(Args) > kReturns ? sizeof...(Args) : kReturns)> stack{
      torch::stable::detail::from(args)...};
  check_torch(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return stack;
}

template <class... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  return torch::stable::detail::to<Tensor>(call_many<1>(name, overload, args...)[0]);
}

// The ops here have no autograd of their own, so what they call must not record any either
// (out= variants refuse operands that require gradients).
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) {
    if (before_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (before_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// --- described tensors --------------------------------------------------------------------------

struct Place {
  bool cuda = false;
  int32_t index = 0;
  bool operator==(const Place& other) const { return cuda == other.cuda && (!cuda || index == other.index); }
};

std::string to_string(Place place);
std::string to_string(Dtype dtype);
std::string name_of_dtype(int32_t torch_dtype);
std::string shape_string(Span sizes);

int32_t torch_dtype(Dtype dtype);

// A tensor with its facts read once. `sizes` and `strides` live as long as the tensor.
struct Described {
  const Tensor* tensor = nullptr;
  Span sizes;
  Span strides;
  Dtype dtype = Dtype::kFloat32;
  Place place;
  void* pointer = nullptr;  // of its first element

  int64_t ndim() const { return static_cast<int64_t>(sizes.size()); }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    return n;
  }
  void* data() const { return pointer; }
};

// The memory from a tensor's first element to the end of its last.
struct Extent {
  const char* begin;
  const char* end;
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};
Extent extent_of(const Described& tensor);
Extent extent_of(const Tensor& flat);  // whose elements are next to each other

// Raises where the dtype is not a floating-point one that the kernels know, or where there is no memory behind all of
// the elements, naming the argument.
Described describe(const Tensor& tensor, const char* name);

// The same of a tensor of any type, whose elements have `element` bytes: torch itself does not look.
void expect_memory(const Tensor& tensor, Span sizes, Span strides, int64_t element, const char* name);

// --- allocation ---------------------------------------------------------------------------------

Tensor empty_strided(Span sizes, Span strides, Dtype dtype, Place place);
// The same memory under other sizes and strides, without a trip through the dispatcher.
Tensor reshaped(const Tensor& tensor, Span sizes, Span strides);
// The same tensor, but to autograd no view of another: what an in-place operation may change.
Tensor owned(const Tensor& result);
Tensor zeros_like(const Described& like);    // keeps dense strides
Tensor empty_like(const Described& like);    // keeps dense strides
Tensor no_tensor(Dtype dtype, Place place);  // shape [0]: an output that was not asked for

Ints contiguous_strides(Span sizes);
int64_t reach(Span sizes, Span strides);  // elements from the first to the last, gaps included
// True for an image whose channels lie next to each other, as torch's kernels decide it.
bool channels_last(const Described& image);
bool row_major(const Described& tensor);    // contiguous
bool is_dense(Span sizes, Span strides);    // every element once, no gaps
bool overlaps(Span sizes, Span strides);    // expanded: some elements share memory
Ints dense_strides(const Described& like);  // its strides where dense, else contiguous ones

}  // namespace taps
