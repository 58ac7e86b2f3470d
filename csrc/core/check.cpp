#include "core/check.h"

#include <cmath>

#include "core/device.h"
#include "kernels.h"

namespace taps {

void expect_place(const Described& got, const char* name, const Described& like, const char* like_name) {
  if (!(got.place == like.place)) {
    fail(name, ": expected a tensor on ", to_string(like.place), " like ", like_name, ", got one on ",
         to_string(got.place));
  }
}

void expect_shape(const Described& got, const char* name, Span expected) {
  bool same = got.sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = got.sizes[i] == expected[i];
  if (!same) {
    fail(name, ": expected shape ", shape_string(expected), ", got ", shape_string(got.sizes));
  }
}

namespace {

Gate resolve_gate(std::optional<bool> gate, const std::optional<Described>& score, double threshold) {
  Gate resolved;
  resolved.threshold = threshold;
  if (gate) {
    resolved.open = *gate;
    return resolved;
  }
  if (!score) fail("gate: expected a bool, or a score to read it from, got None for both");
  if (std::isnan(threshold)) fail("threshold: expected a number, got NaN");
  if (cuda::runs(score->place.cuda)) {
    resolved.score = score->data();
    resolved.score_dtype = score->dtype;
    return resolved;
  }
  // Compared in the score's own precision, as `score >= threshold` is in torch.
  if (score->dtype == Dtype::kFloat64) {
    const double value = *static_cast<const double*>(score->data());
    if (std::isnan(value)) fail("score: expected a number, got NaN");
    resolved.open = value >= threshold;
  } else {
    const float value = *static_cast<const float*>(score->data());
    if (std::isnan(value)) fail("score: expected a number, got NaN");
    resolved.open = value >= static_cast<float>(threshold);
  }
  return resolved;
}

}  // namespace

GatedWeight check_weight(const Tensor& weight, const OptionalTensor& delta, const OptionalTensor& score,
                         std::optional<bool> gate, double threshold, int64_t ndim) {
  GatedWeight checked;
  checked.weight = describe(weight, "weight");
  if (ndim > 0 && checked.weight.ndim() != ndim) {
    fail("weight: expected ", ndim, " dimensions, got shape ", shape_string(checked.weight.sizes));
  }
  if (score) {
    checked.score = describe(*score, "score");
    const Described& s = *checked.score;
    if (s.dtype != Dtype::kFloat32 && s.dtype != Dtype::kFloat64) {
      fail("score: expected dtype float32 or float64, got ", to_string(s.dtype));
    }
    if (s.numel() != 1) fail("score: expected one element, got shape ", shape_string(s.sizes));
    expect_place(s, "score", checked.weight, "weight");
  }
  if (delta) {
    checked.delta = describe(*delta, "delta");
    expect_shape(*checked.delta, "delta", checked.weight.sizes);
    expect_place(*checked.delta, "delta", checked.weight, "weight");
    checked.gate = resolve_gate(gate, checked.score, threshold);
  }
  return checked;
}

Described check_activation(const Tensor& tensor, const char* name, const Described& weight) {
  Described checked = describe(tensor, name);
  expect_place(checked, name, weight, "weight");
  return checked;
}

Wanted check_mask(const std::vector<bool>& mask, const GatedWeight& w) {
  if (mask.size() != 5) fail("output_mask: expected 5 bools, got ", mask.size());
  const Wanted wanted{mask[0], mask[1], mask[2], mask[3], mask[4]};
  if (wanted.delta && !w.delta) fail("delta: expected a tensor, its gradient is asked for; got None");
  if (wanted.score && !w.delta) {
    fail("delta: expected a tensor, the score's gradient <G, delta> is asked for; got None");
  }
  if (wanted.score && !w.score) fail("score: expected a tensor, its gradient is asked for; got None");
  return wanted;
}

void check_rows(const OptionalTensor& rows, const Described& activation, const char* name, int64_t limit) {
  if (!rows) return;
  int64_t ndim = 0;
  int32_t dtype = 0, device_type = 0;
  check_torch(aoti_torch_get_dim(rows->get(), &ndim), "rows");
  check_torch(aoti_torch_get_dtype(rows->get(), &dtype), "rows");
  check_torch(aoti_torch_get_device_type(rows->get(), &device_type), "rows");
  if (ndim != 1 || dtype != aoti_torch_dtype_int64()) {
    fail("rows: expected int64 indices of shape [R], got ", ndim, " dimensions of dtype ", name_of_dtype(dtype));
  }
  const bool cuda = device_type == aoti_torch_device_type_cuda();
  if (cuda != activation.place.cuda || (!cuda && device_type != aoti_torch_device_type_cpu())) {
    fail("rows: expected a tensor on ", to_string(activation.place), " like ", name);
  }
  const int64_t count = rows->numel(), step = rows->stride(0);
  if (count > 1 && step == 0) {  // no memory bounds how many there are
    fail("rows: expected memory for each of the indices, got one that is expanded to ", count);
  }
  expect_memory(*rows, Span(&count, 1), Span(&step, 1), sizeof(int64_t), "rows");
  if (cuda) return;  // the gather itself checks there; looking would synchronise
  const int64_t* index = static_cast<const int64_t*>(rows->data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (index[i * step] < 0 || index[i * step] >= limit) {
      fail("rows: expected indices in [0, ", limit, "), got ", index[i * step]);
    }
  }
}

namespace {

Codec codec_named(const std::string& name) {
  if (name == "bitmask") return Codec::kBitmask;
  if (name == "int8") return Codec::kInt8;
  if (name == "int4") return Codec::kInt4;
  if (name == "sign") return Codec::kSign;
  fail("codec: expected bitmask, int8, int4 or sign, got ", name);
}

// A flat tensor of a codec, where the weight is; `count` < 0 for any number of elements.
void check_flat(const Tensor& tensor, const char* name, int32_t dtype, int64_t element, int64_t count, Place place) {
  int64_t ndim = 0;
  int32_t found = 0, device = 0;
  Place own;
  check_torch(aoti_torch_get_dim(tensor.get(), &ndim), name);
  check_torch(aoti_torch_get_dtype(tensor.get(), &found), name);
  check_torch(aoti_torch_get_device_type(tensor.get(), &device), name);
  check_torch(aoti_torch_get_device_index(tensor.get(), &own.index), name);
  own.cuda = device == aoti_torch_device_type_cuda();
  if ((!own.cuda && device != aoti_torch_device_type_cpu()) || !(own == place)) {
    fail(name, ": expected a tensor on ", to_string(place), " like weight");
  }
  const int64_t numel = tensor.numel(), step = ndim == 1 ? tensor.stride(0) : 1;
  if (ndim != 1 || found != dtype || (numel > 1 && step != 1)) {
    fail(name, ": expected ", name_of_dtype(dtype), " next to each other in one dimension, got ", ndim,
         " dimensions of ", name_of_dtype(found));
  }
  if (count >= 0 && numel != count) fail(name, ": expected ", count, " elements for this weight, got ", numel);
  expect_memory(tensor, Span(&numel, 1), Span(&step, 1), element, name);
}

}  // namespace

PackedDelta check_layout(const Described& weight, const Tensor& codes, const Tensor& values, const std::string& codec) {
  PackedDelta delta;
  delta.codec = codec_named(codec);
  if (weight.ndim() < 1) fail("weight: expected one dimension or more, got none");
  const int64_t numel = weight.numel();
  delta.rows = weight.sizes[0];
  delta.columns = delta.rows > 0 ? numel / delta.rows : 0;
  const bool bits = delta.codec == Codec::kBitmask || delta.codec == Codec::kSign;
  const int64_t bytes = bits ? (numel + 7) / 8 : delta.codec == Codec::kInt4 ? (numel + 1) / 2 : numel;
  const int32_t kind = delta.codec == Codec::kInt8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_uint8();
  check_flat(codes, "codes", kind, 1, bytes, weight.place);
  const int64_t groups = (numel + kScaleGroup - 1) / kScaleGroup;
  const int64_t count = delta.codec == Codec::kBitmask ? -1 : bits ? delta.rows : groups;
  check_flat(values, "values", bits ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(), bits ? 4 : 2, count,
             weight.place);
  delta.kept = delta.codec == Codec::kBitmask ? values.numel() : 0;
  delta.codes = codes.data_ptr();
  delta.values = values.data_ptr();
  return delta;
}

PackedDelta check_packed(const Described& weight, const Tensor& codes, const Tensor& values, const std::string& codec) {
  const PackedDelta delta = check_layout(weight, codes, values, codec);
  if (delta.codec == Codec::kBitmask && !weight.place.cuda) {  // no value is read that is not there
    const int64_t found = cpu::count_bits(delta.codes, (delta.numel() + 7) / 8);
    if (found != delta.kept) fail("codes: expected ", delta.kept, " bits, one for each value, got ", found);
  }
  return delta;
}

}  // namespace taps
