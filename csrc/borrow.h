// Python's tensors as plain memory, and leased memory as a tensor of Python, through DLPack's exchange API: a table of
// C functions that torch hands out, the same in every version served. For calls too small for an operator (direct.h).
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "kernels.h"
#include "workspace.h"

namespace taps {

// A plain torch.Tensor or Parameter on the CPU, of a type that the kernels know. Valid while its tensor is held.
struct Borrowed {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int ndim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t numel = 0;

  bool is_contiguous() const;
  bool is_channels_last() const;
};

// Fetches torch's types, its table of functions and the questions below. Once, before everything else here.
void meet_torch();

// True where a function's arguments may be kept or its operators are to be seen: a mode, a trace. Of callers straight
// from a user, true also where a call means something else: autocast, a transform of torch.func.
bool watched(bool outermost);

// False, and no error set, for whatever else it is: a subclass, sparse, on another device, of another type.
bool borrow(pybind11::handle tensor, Borrowed& borrowed);

// Whether the values are what the memory says: false where it has been freed, and for a view that negates.
bool holds_values(pybind11::handle tensor, const Borrowed& borrowed);

// Leased memory as a tensor with the sizes and strides of `like`; it gives the lease back when it is dropped.
pybind11::object lend(std::unique_ptr<Lease> lease, const Borrowed& like, Dtype dtype);

}  // namespace taps
