// Whether two tensors share memory, to the byte, whatever their strides.
#pragma once

#include "tensor.h"

namespace taps {

// The bytes of a tensor's elements.
class Footprint {
 public:
  explicit Footprint(const Described& tensor);
  // The range from the first element to the last; empty without elements.
  const char* begin() const { return begin_; }
  const char* end() const { return end_; }
  bool meets(const Footprint& other) const;

 private:
  struct Dim {
    int64_t size, stride;  // in bytes
    int64_t inside;        // bytes from the first element of an index to the end of its last
  };
  bool touches(const char* begin, const char* end) const { return touches(dims_.size(), begin_, begin, end); }
  bool touches(size_t dims, const char* at, const char* begin, const char* end) const;
  bool any_run(size_t dims, const char* at, const Footprint& other) const;

  std::vector<Dim> dims_;  // by stride
  int64_t run_ = 0;        // bytes of a piece without gaps
  const char* begin_ = nullptr;
  const char* end_ = nullptr;
};

}  // namespace taps
