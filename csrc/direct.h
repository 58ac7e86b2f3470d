// What eager calls of Python use instead of operators, whose calls cost more than a small layer, and most where their
// code is no longer in the caches. Every function gives None where the operator must do it: it does the same, or says
// what is wrong. The results are the operator's to the bit.
#pragma once

#include <pybind11/pybind11.h>

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

pybind11::object direct_linear(const Layer& layer, const Call& call);
pybind11::object direct_conv2d(const Layer& layer, pybind11::handle stride, pybind11::handle padding,
                               pybind11::handle dilation, pybind11::handle groups, const Call& call);

}  // namespace taps
