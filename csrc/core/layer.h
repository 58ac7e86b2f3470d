// A layer as Python calls it past the operators, whose calls cost more than a small layer, and most where their code is
// no longer in the caches. Such a call gives None where the operator must do it: it does the same, or says what is
// wrong. The results are the operator's to the bit.
#pragma once

#include <pybind11/pybind11.h>

#include "core/check.h"
#include "core/choose.h"

namespace taps {

// How a layer is called. `outermost`: straight by a user, with nothing looked at yet. `training`: for gradients, so
// that nothing is fused.
struct Call {
  bool gate, training, outermost;
};

// The tensors of a layer: plain, weight and Delta dense and of one layout, on the CPU. Score and bias may be None.
struct Layer {
  pybind11::handle input, weight, delta, score, bias;
};

struct Operands {
  Described x;
  GatedWeight w;
  std::optional<Described> bias;
};

// All of a layer's tensors, or nothing. Score and bias are what the operator takes: torch's own functions let more
// pass. `ndim`: of the weight.
std::optional<Operands> borrow_layer(const Layer& layer, const Call& call, int64_t ndim);

// Whether kernels of our own may read input and bias.
bool readable(const Layer& layer, const Operands& operands);

// The weight that torch's own function is to multiply with, or None.
pybind11::object weight_of(const Layer& layer, const Operands& operands, Path path);

// A new result of torch's, and where its elements are.
struct Result {
  pybind11::object tensor;
  void* data;
};
Result new_result(Span sizes, Span strides, Dtype dtype);

inline const void* data_of(const std::optional<Described>& tensor) { return tensor ? tensor->data() : nullptr; }

}  // namespace taps
