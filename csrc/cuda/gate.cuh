// The gate as a kernel sees it.
#pragma once

#include "cuda/primitives.cuh"
#include "kernels.h"

namespace taps::dev {

// Compared in the score's own precision, as `score >= threshold` is in torch. NaN is closed.
TAPS_DEVICE bool is_open(const Gate& gate) {
  if (!gate.score) return gate.open;
  return gate.score_dtype == Dtype::kFloat64
             ? *static_cast<const double*>(gate.score) >= gate.threshold
             : *static_cast<const float*>(gate.score) >= static_cast<float>(gate.threshold);
}

}  // namespace taps::dev
