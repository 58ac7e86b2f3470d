#include "overlap.h"

#include <algorithm>

namespace taps {

Footprint::Footprint(const Described& tensor) {
  begin_ = end_ = static_cast<const char*>(tensor.data());
  if (tensor.numel() == 0) return;
  run_ = size_of(tensor.dtype);
  for (size_t dim = 0; dim < tensor.sizes.size(); ++dim) {
    const int64_t stride = tensor.strides[dim] * run_;
    if (tensor.sizes[dim] > 1 && stride > 0) dims_.push_back({tensor.sizes[dim], stride, 0});
  }
  std::sort(dims_.begin(), dims_.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  int64_t inside = run_;
  for (Dim& dim : dims_) {
    dim.inside = inside;
    inside += (dim.size - 1) * dim.stride;
  }
  end_ = begin_ + inside;
  while (!dims_.empty() && dims_.front().stride == run_) {
    run_ *= dims_.front().size;
    dims_.erase(dims_.begin());
  }
}

// Whether a piece of the first `dims` dimensions from `at` on has a byte in [begin, end).
bool Footprint::touches(size_t dims, const char* at, const char* begin, const char* end) const {
  if (dims == 0) return at < end && at + run_ > begin;
  const Dim& dim = dims_[dims - 1];
  const int64_t before = begin - at - dim.inside;  // what ends there ends too early
  for (int64_t i = before < 0 ? 0 : before / dim.stride + 1; i < dim.size && at + i * dim.stride < end; ++i) {
    if (touches(dims - 1, at + i * dim.stride, begin, end)) return true;
  }
  return false;
}

bool Footprint::any_run(size_t dims, const char* at, const Footprint& other) const {
  if (dims == 0) return other.touches(at, at + run_);
  for (int64_t i = 0; i < dims_[dims - 1].size; ++i) {
    if (any_run(dims - 1, at + i * dims_[dims - 1].stride, other)) return true;
  }
  return false;
}

bool Footprint::meets(const Footprint& other) const {
  if (begin_ >= other.end_ || other.begin_ >= end_) return false;
  if (other.dims_.empty()) return touches(other.begin_, other.end_);
  return any_run(dims_.size(), begin_, other);
}

}  // namespace taps
