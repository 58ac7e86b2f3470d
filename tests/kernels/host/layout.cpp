// Where the fields of the kernels' arguments are, by name: what a test needs to write them itself.
#include <cstddef>
#include <cstdio>

#include "kernels.h"

#define TAPS_FIELD(type, field) std::printf(#type "." #field " %zu\n", offsetof(taps::type, field))

int main() {
  std::printf("LinearProduct %zu\n", sizeof(taps::LinearProduct));
  TAPS_FIELD(LinearProduct, rows);
  TAPS_FIELD(LinearProduct, outputs);
  TAPS_FIELD(LinearProduct, inputs);
  TAPS_FIELD(LinearProduct, x);
  TAPS_FIELD(LinearProduct, dy);
  TAPS_FIELD(LinearProduct, weight);
  TAPS_FIELD(LinearProduct, delta);
  TAPS_FIELD(LinearProduct, bias);
  TAPS_FIELD(LinearProduct, result);
  TAPS_FIELD(LinearProduct, ld_result);
  TAPS_FIELD(LinearProduct, compute);
  TAPS_FIELD(LinearProduct, weight_dtype);
  TAPS_FIELD(LinearProduct, delta_dtype);
  TAPS_FIELD(LinearProduct, gate.open);
  TAPS_FIELD(LinearProduct, gate.score);
  TAPS_FIELD(LinearProduct, gate.score_dtype);
  TAPS_FIELD(LinearProduct, gate.threshold);
  TAPS_FIELD(LinearProduct, scale);
  TAPS_FIELD(LinearProduct, score_gradient);
  TAPS_FIELD(LinearProduct, score_dtype);
  TAPS_FIELD(LinearProduct, memory);
  TAPS_FIELD(LinearProduct, splits);
  TAPS_FIELD(LinearProduct, depth_of_split);
}
