// W_t = round(W + g * Delta) of a packed Delta.
#include "core/weight.h"
#include "ops.h"

namespace taps {
namespace {

Codec codec_named(const std::string& name) {
  if (name == "bitmask") return Codec::kBitmask;
  if (name == "int8") return Codec::kInt8;
  if (name == "int4") return Codec::kInt4;
  if (name == "sign") return Codec::kSign;
  fail("codec: expected bitmask, int8, int4 or sign, got ", name);
}

// The bytes from a tensor's first element to the end of its last.
struct Bytes {
  const char* begin;
  const char* end;
  bool meets(const Bytes& other) const { return begin < other.end && other.begin < end; }
};

Bytes bytes_of(const Described& tensor) {
  const char* begin = static_cast<const char*>(tensor.data());
  return {begin, begin + reach(tensor.sizes, tensor.strides) * size_of(tensor.dtype)};
}

// A flat tensor of a codec; `count` < 0 for any number of elements.
Bytes check_flat(const Tensor& tensor, const char* name, int32_t dtype, int64_t element, int64_t count) {
  int64_t ndim = 0;
  int32_t found = 0, device = 0;
  check_torch(aoti_torch_get_dim(tensor.get(), &ndim), name);
  check_torch(aoti_torch_get_dtype(tensor.get(), &found), name);
  check_torch(aoti_torch_get_device_type(tensor.get(), &device), name);
  if (device != aoti_torch_device_type_cpu()) fail(name, ": expected a tensor on cpu like weight");
  const int64_t numel = tensor.numel(), step = ndim == 1 ? tensor.stride(0) : 1;
  if (ndim != 1 || found != dtype || (numel > 1 && step != 1)) {
    fail(name, ": expected ", name_of_dtype(dtype), " next to each other in one dimension, got ", ndim,
         " dimensions of ", name_of_dtype(found));
  }
  if (count >= 0 && numel != count) fail(name, ": expected ", count, " elements for this weight, got ", numel);
  expect_memory(tensor, Span(&numel, 1), Span(&step, 1), element, name);
  const char* begin = static_cast<const char*>(tensor.data_ptr());
  return {begin, begin + numel * element};
}

bool row_major(const Described& tensor) {
  int64_t step = 1;
  for (int64_t dim = tensor.ndim() - 1; dim >= 0; --dim) {
    const size_t at = static_cast<size_t>(dim);
    if (tensor.sizes[at] != 1 && tensor.strides[at] != step) return false;
    step *= tensor.sizes[at];
  }
  return true;
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
  Unpack args;
  PackedDelta& delta = args.delta;
  delta.codec = codec_named(codec);
  delta.rows = w.weight.sizes[0];
  const int64_t numel = w.weight.numel();
  delta.columns = delta.rows > 0 ? numel / delta.rows : 0;
  const bool bits = delta.codec == Codec::kBitmask || delta.codec == Codec::kSign;
  const int64_t bytes = bits ? (numel + 7) / 8 : delta.codec == Codec::kInt4 ? (numel + 1) / 2 : numel;
  const Bytes first = check_flat(
      codes, "codes", delta.codec == Codec::kInt8 ? aoti_torch_dtype_int8() : aoti_torch_dtype_uint8(), 1, bytes);
  const int64_t scales = delta.codec == Codec::kBitmask ? -1
                         : bits                         ? delta.rows
                                                        : (numel + kScaleGroup - 1) / kScaleGroup;
  const Bytes second = check_flat(values, "values", bits ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(),
                                  bits ? 4 : 2, scales);
  if (delta.codec == Codec::kBitmask) {  // no value is read that is not there
    const int64_t found = cpu::count_bits(codes.data_ptr(), bytes);
    if (found != values.numel()) fail("codes: expected ", values.numel(), " bits, one for each value, got ", found);
  }
  const Bytes written = bytes_of(result);
  if (written.meets(first) || written.meets(second) || written.meets(bytes_of(w.weight)) ||
      (score && written.meets(bytes_of(*w.score)))) {
    fail("out: expected memory of its own, got some of an operand's");
  }
  if (numel == 0) return;
  if (!w.gate.open) {
    reconstruct_into(result, &w.weight, nullptr, w.gate);
    return;
  }
  delta.codes = codes.data_ptr();
  delta.values = values.data_ptr();
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
