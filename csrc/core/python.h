// Python's tensors as plain memory, and leased memory as a tensor of Python, through DLPack's exchange API: a table of
// C functions that torch hands out, the same in every version served. For calls too small for an operator (layer.h).
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "core/tensor.h"
#include "core/workspace.h"

namespace taps {

// Fetches torch's types, its table of functions and the questions below. Once, before everything else here.
void meet_torch();

// True where a function's arguments may be kept or its operators are to be seen: a mode, a trace, a profile. Of callers
// straight from a user, true also where a call means something else: autocast, a transform of torch.func.
bool watched(bool outermost);

// The facts of a plain torch.Tensor or Parameter on the CPU, of a type that the kernels know; they hold while it does.
// False, and no error set, for whatever else it is: a subclass, sparse, on another device, of another type.
bool borrow(pybind11::handle tensor, Described& borrowed);

// False where the memory behind the elements has been freed, which torch itself does not see before it copies.
bool has_memory(pybind11::handle tensor, const Described& borrowed);

// Whether the values are the negatives of what the memory holds.
bool negates(pybind11::handle tensor);

// Leased memory as a tensor; it gives the lease back when it is dropped.
pybind11::object lend(std::unique_ptr<Lease> lease, Span sizes, Span strides, Dtype dtype);

// A new tensor of torch's own.
pybind11::object fresh(Span sizes, Span strides, Dtype dtype);

// A result without gradients that may be a view as one that is none: what an in-place operation may change.
pybind11::object owned(pybind11::handle result);

// torch's own functions, or None where they raise a RuntimeError.
pybind11::object stock_linear(pybind11::handle input, pybind11::handle weight, pybind11::handle bias);
pybind11::object stock_conv2d(pybind11::handle input, pybind11::handle weight, pybind11::handle bias,
                              pybind11::handle stride, pybind11::handle padding, pybind11::handle dilation,
                              pybind11::handle groups);

}  // namespace taps
