// The arguments of operators, checked once, as plain structs. Messages name the argument, what was expected and what
// came.
#pragma once

#include "core/change.h"
#include "core/gate.h"
#include "core/tensor.h"

namespace taps {

void expect_place(const Described& got, const char* name, const Described& like, const char* like_name);
void expect_shape(const Described& got, const char* name, Span expected);

// The weight with its optional delta and gate.
struct GatedWeight {
  Described weight;
  std::optional<Described> delta;
  std::optional<Described> score;
  Gate gate;  // resolved: on the CPU the host reads the score itself

  bool known_closed() const { return !delta || (!gate.on_device() && !gate.open); }
};

// `ndim`: of the weight; 0 for any.
GatedWeight check_weight(const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                         std::optional<bool> gate, double threshold, int64_t ndim);

// An activation: same device as the weight, and the dtype the product is computed in.
Described check_activation(const Tensor& tensor, const char* name, const Described& weight);

// What a backward op is asked for, in the order of its results.
struct Wanted {
  bool input, delta, score, bias, weight;
  bool weight_side() const { return delta || score || weight; }
};
Wanted check_mask(const std::vector<bool>& mask, const GatedWeight& w);

// A packed Delta of this weight: shapes and types. What codes and values hold may be anything.
PackedDelta check_layout(const Described& weight, const Tensor& codes, const Tensor& values, const std::string& codec);

// The same, and on the CPU of a bitmask as many bits as values; to count them on a GPU would be to wait for it, so that
// its kernels read no value that is not there.
PackedDelta check_packed(const Described& weight, const Tensor& codes, const Tensor& values, const std::string& codec);

// The rows, below `limit`, of an activation called `name` that the weight gradient is estimated from.
void check_rows(const OptionalTensor& rows, const Described& activation, const char* name, int64_t limit);

}  // namespace taps
