// Work in panels of output channels: where W_t as a whole would exceed the limit on the workspace,
// an op calls itself once for each panel, so that only one panel of W_t exists at a time.
#pragma once

#include "rebuild.h"

namespace taps {

struct Range {
  int64_t start, length;
};

// Output channels of one panel (whole groups, multiples of 16 where the limit allows), or 0 where
// the weight in the compute type is within the limit or cannot be cut.
int64_t panel_step(const Described& weight, Dtype compute, int64_t groups);

Tensor narrow(const Tensor& tensor, int64_t dim, Range range);
OptionalTensor narrow(const OptionalTensor& tensor, int64_t dim, Range range);

// The input channels that a range of output channels reads: all, or those of its groups.
Range input_range(const Described& weight, Range outputs, int64_t groups);

template <class Each>
void for_panels(int64_t channels, int64_t step, const Each& each) {
  for (int64_t start = 0; start < channels; start += step) {
    each(Range{start, std::min(step, channels - start)});
  }
}

// True for an image whose channels lie next to each other, as torch's kernels decide it.
bool channels_last(const Described& image);

// A result made of slices along `dim`; `size` is the whole's. It is laid out like its first slice,
// unless that is channels_last only because the slice is too small to tell.
class Slices {
 public:
  Slices(int64_t dim, int64_t size, bool may_be_channels_last = true)
      : dim_(dim), size_(size), may_be_channels_last_(may_be_channels_last) {}
  Slices(Tensor whole, int64_t dim) : dim_(dim), size_(0), whole_(std::move(whole)) {}
  void put(const Tensor& part, Range range);
  const OptionalTensor& whole() const { return whole_; }

 private:
  int64_t dim_, size_;
  bool may_be_channels_last_ = true;
  OptionalTensor whole_;
};

// A result that is the sum of its parts, added in order; in float32 where the parts are narrower.
class Sum {
 public:
  void add(const Tensor& part);
  OptionalTensor whole() const;  // in the type of the parts

 private:
  Dtype dtype_ = Dtype::kFloat32;
  OptionalTensor sum_;
};

}  // namespace taps
