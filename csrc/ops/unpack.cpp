// W_t = round(W + g * Delta) of a packed Delta.
#include "core/weight.h"
#include "ops.h"

namespace taps {
void unpack(const Tensor& out, const Tensor& weight, const Tensor& codes, const Tensor& values,
            const std::string& codec, const OptionalTensor& score, std::optional<bool> gate, double threshold) {
  const GatedWeight w = check_weight(weight, weight, score, gate, threshold, 0);  // of Delta's own shape
  const Described result = describe(out, "out");
  expect_shape(result, "out", w.weight.sizes);
  expect_place(result, "out", w.weight, "weight");
  if (w.weight.ndim() < 1) fail("weight: expected one dimension or more, got none");
  if (overlaps(result.sizes, result.strides)) {
    fail("out: expected distinct memory for every element, got strides that share some");
  }
  const PackedDelta delta = check_packed(w.weight, codes, values, codec);
  const Extent written = extent_of(result);
  if (written.meets(extent_of(codes)) || written.meets(extent_of(values)) || written.meets(extent_of(w.weight)) ||
      (score && written.meets(extent_of(*w.score)))) {
    fail("out: expected memory of its own, got some of an operand's");
  }
  if (delta.numel() == 0) return;
  if (!w.gate.open) {
    reconstruct_into(result, &w.weight, nullptr, w.gate);
    return;
  }
  Unpack args;
  args.delta = delta;
  if (row_major(result) && row_major(w.weight)) {
    args.out = result.data();
    args.out_dtype = result.dtype;
    args.weight = w.weight.data();
    args.weight_dtype = w.weight.dtype;
    cpu::unpack(args);
    return;
  }
  const Tensor plain = empty_strided(w.weight.sizes, contiguous_strides(w.weight.sizes), Dtype::kFloat32, result.place);
  const Described decoded = describe(plain, "delta");
  args.out = decoded.data();
  cpu::unpack(args);
  reconstruct_into(result, &w.weight, &decoded, w.gate);
}

}  // namespace taps
