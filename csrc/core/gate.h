// The gate of a layer, as kernels see it.
#pragma once

#include "core/dtype.h"

namespace taps {

// g = 1[s >= tau]. Either the host knows it (`score == nullptr`, use `open`) or the device reads
// the score itself.
struct Gate {
  bool open = false;
  const void* score = nullptr;
  Dtype score_dtype = Dtype::kFloat32;
  double threshold = 0.0;

  bool on_device() const { return score != nullptr; }
};

}  // namespace taps
