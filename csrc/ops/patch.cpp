// Patches between tensors, on their bytes: what differs, and the proof and the writing of it (docs/patch.md).
#include "cpu/patch.h"

#include <algorithm>
#include <cstring>

#include "ops.h"

namespace taps {
namespace {

struct Bytes {
  uint8_t* data = nullptr;
  int64_t size = 0;
};

Bytes bytes_of(const Tensor& tensor, const char* name) {
  const AtenTensorHandle handle = tensor.get();
  int64_t ndim = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  void* data = nullptr;
  check_torch(aoti_torch_get_dim(handle, &ndim), name);
  check_torch(aoti_torch_get_dtype(handle, &dtype), name);
  if (dtype != aoti_torch_dtype_uint8() || ndim != 1) {
    fail(name, ": expected a vector of uint8, got ", ndim, " dimensions of ", name_of_dtype(dtype));
  }
  check_torch(aoti_torch_get_sizes(handle, &sizes), name);
  check_torch(aoti_torch_get_strides(handle, &strides), name);
  if (sizes[0] > 1 && strides[0] != 1) fail(name, ": expected bytes next to each other, got a stride of ", strides[0]);
  expect_memory(tensor, Span(sizes, 1), Span(strides, 1), 1, name);
  check_torch(aoti_torch_get_data_ptr(handle, &data), name);
  return {static_cast<uint8_t*>(data), sizes[0]};
}

void expect_unit(int64_t unit) {
  if (unit != 1 && unit != 2 && unit != 4 && unit != 8) fail("unit: expected 1, 2, 4 or 8, got ", unit);
}

void expect_width(int64_t width) {
  if (width != 0 && width != 1 && width != 2 && width != 4) fail("width: expected 0, 1, 2 or 4, got ", width);
}

void expect_whole(const Bytes& bytes, int64_t unit, const char* name) {
  if (bytes.size % unit != 0) fail(name, ": expected a multiple of ", unit, " bytes, got ", bytes.size);
}

Bytes pair_of(const Tensor& before, const Tensor& after, int64_t unit, Bytes* second) {
  const Bytes first = bytes_of(before, "before");
  *second = bytes_of(after, "after");
  expect_unit(unit);
  expect_whole(first, unit, "before");
  if (first.size != second->size) fail("after: expected ", first.size, " bytes like before, got ", second->size);
  return first;
}

struct Coded {
  cpu::PatchIndex index;
  Bytes values;
  int64_t count;
};

cpu::PatchIndex index_of(const Bytes& codes, int64_t units, int64_t unit, int64_t width) {
  expect_width(width);
  if (units < 0 || units > (INT64_C(1) << 62) / unit) fail("units: expected a tensor's size, got ", units);
  if (width == 0 && codes.size != (units + 7) / 8) {
    fail("index: expected ", (units + 7) / 8, " bytes for ", units, " bits, got ", codes.size);
  }
  expect_whole(codes, std::max<int64_t>(width, 1), "index");
  return {codes.data, codes.size, static_cast<int>(width), units};
}

Coded coded(const Tensor& index, const Tensor& values, int64_t unit, int64_t units, int64_t width) {
  const Bytes codes = bytes_of(index, "index"), news = bytes_of(values, "values");
  expect_unit(unit);
  expect_whole(news, unit, "values");
  return {index_of(codes, units, unit, width), news, news.size / unit};
}

int64_t signed_of(uint64_t bits) { return static_cast<int64_t>(bits); }

std::vector<int64_t> told(const cpu::PatchChecked& result) {
  return {static_cast<int64_t>(result.fault), result.at, signed_of(result.sum.low), signed_of(result.sum.high)};
}

}  // namespace

std::vector<int64_t> patch_sum(const Tensor& bytes, int64_t first_word) {
  const Bytes given = bytes_of(bytes, "bytes");
  const cpu::PatchSum sum = cpu::patch_sum(given.data, given.size, first_word);
  return {signed_of(sum.low), signed_of(sum.high)};
}

std::vector<int64_t> patch_measure(const Tensor& before, const Tensor& after, int64_t unit) {
  Bytes second;
  const Bytes first = pair_of(before, after, unit, &second);
  const cpu::PatchSizes sizes = cpu::patch_measure(first.data, second.data, first.size, static_cast<int>(unit));
  return {sizes.count, sizes.codes[0], sizes.codes[1], sizes.codes[2]};
}

std::vector<int64_t> patch_encode(const Tensor& before, const Tensor& after, const Tensor& index, const Tensor& values,
                                  int64_t unit, int64_t width) {
  Bytes second;
  const Bytes first = pair_of(before, after, unit, &second);
  expect_width(width);
  const Bytes codes = bytes_of(index, "index"), news = bytes_of(values, "values");
  cpu::PatchSum replaced;
  if (!cpu::patch_encode(first.data, second.data, first.size, static_cast<int>(unit), static_cast<int>(width),
                         codes.data, codes.size, news.data, news.size, &replaced)) {
    fail("index, values: expected the room that patch_measure tells; were the tensors written to in between?");
  }
  return {signed_of(replaced.low), signed_of(replaced.high)};
}

std::vector<int64_t> patch_check(const OptionalTensor& target, const Tensor& index, const Tensor& values, int64_t unit,
                                 int64_t units, int64_t width) {
  const Coded given = coded(index, values, unit, units, width);
  uint8_t* data = nullptr;
  if (target) {
    const Bytes bytes = bytes_of(*target, "target");
    if (bytes.size != units * unit) fail("target: expected ", units * unit, " bytes, got ", bytes.size);
    data = bytes.data;
  }
  return told(cpu::patch_check(given.index, given.values.data, given.count, static_cast<int>(unit), data));
}

std::vector<int64_t> patch_write(const Tensor& target, const Tensor& index, const Tensor& values, int64_t unit,
                                 int64_t width) {
  const Bytes bytes = bytes_of(target, "target");
  expect_unit(unit);
  expect_whole(bytes, unit, "target");
  const Coded given = coded(index, values, unit, bytes.size / unit, width);
  return told(cpu::patch_write(given.index, given.values.data, given.count, static_cast<int>(unit), bytes.data));
}

std::vector<int64_t> patch_prove(const Tensor& index, int64_t count, int64_t units, int64_t width) {
  const Bytes codes = bytes_of(index, "index");
  return told(cpu::patch_prove(index_of(codes, units, 1, width), count));
}

void patch_swap(const Tensor& target, const Tensor& index, const Tensor& values, const Tensor& old,
                const Tensor& swapped, int64_t unit, int64_t width) {
  const Bytes bytes = bytes_of(target, "target"), kept = bytes_of(old, "old"), record = bytes_of(swapped, "swapped");
  expect_unit(unit);
  expect_whole(bytes, unit, "target");
  const Coded given = coded(index, values, unit, bytes.size / unit, width);
  if (kept.size != given.values.size) fail("old: expected ", given.values.size, " bytes like values, got ", kept.size);
  int64_t numbers[5] = {};
  if (record.size != sizeof numbers) fail("swapped: expected ", sizeof numbers, " bytes, got ", record.size);
  const cpu::PatchChecked result =
      cpu::patch_swap(given.index, given.values.data, given.count, static_cast<int>(unit), bytes.data, kept.data);
  const std::vector<int64_t> facts = told(result);
  std::copy(facts.begin(), facts.end(), numbers);
  numbers[4] = result.done;
  std::memcpy(record.data, numbers, sizeof numbers);
}

}  // namespace taps
