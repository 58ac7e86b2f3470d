// W_t = round(W + g * Delta) of a packed Delta.
#include "core/device.h"
#include "core/weight.h"
#include "ops.h"

namespace taps {
namespace {

void run(Unpack& args, Place place) {
  if (!cuda::runs(place.cuda)) {
    cpu::unpack(args);
    return;
  }
  args.chunk = unpack_chunk(args.delta);
  const int64_t counted = args.chunks() > 1 ? args.chunks() - 1 : 0;
  const Lease counts(place.cuda, place.index, static_cast<size_t>(counted) * sizeof(int64_t));
  args.counts = static_cast<int64_t*>(counts.data());
  cuda::unpack(args, place.index, stream_of(place));
}

}  // namespace

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
  if (w.known_closed()) {
    reconstruct_into(result, &w.weight, nullptr, w.gate);
    return;
  }
  Unpack args;
  args.delta = delta;
  args.gate = w.gate;
  if (row_major(result) && row_major(w.weight)) {
    args.out = result.data();
    args.out_dtype = result.dtype;
    args.weight = w.weight.data();
    args.weight_dtype = w.weight.dtype;
    run(args, result.place);
    return;
  }
  const Tensor plain = empty_strided(w.weight.sizes, contiguous_strides(w.weight.sizes), Dtype::kFloat32, result.place);
  const Described decoded = describe(plain, "delta");
  args.out = decoded.data();
  run(args, result.place);
  reconstruct_into(result, &w.weight, &decoded, w.gate);
}

}  // namespace taps
