// What a codec makes of a Delta.
#include "core/check.h"
#include "kernels.h"
#include "ops.h"

namespace taps {

void encode(const Tensor& delta, const Tensor& codes, const Tensor& values, const std::string& codec) {
  const Described described = describe(delta, "delta");
  if (described.dtype != Dtype::kFloat32 || described.place.cuda || !row_major(described)) {
    fail("delta: expected contiguous float32 on cpu, got ", to_string(described.dtype), " on ",
         to_string(described.place), row_major(described) ? "" : " that is not contiguous");
  }
  const PackedDelta made = check_layout(described, codes, values, codec);
  if (extent_of(codes).meets(extent_of(described)) || extent_of(values).meets(extent_of(described)) ||
      extent_of(codes).meets(extent_of(values))) {
    fail("codes, values: expected memory of their own, got some of another's");
  }
  Encode args;
  args.delta = static_cast<const float*>(described.data());
  args.codec = made.codec;
  args.rows = made.rows;
  args.columns = made.columns;
  args.codes = codes.data_ptr();
  args.values = values.data_ptr();
  args.kept = values.numel();
  if (!cpu::encode(args)) {
    fail("delta: expected finite values that codec ", codec,
         codec == "bitmask" ? " has room for, got others, or fewer than values" : " holds, got others");
  }
}

}  // namespace taps
