#include "core/tensor.h"

#include <dlfcn.h>

#include <algorithm>

namespace taps {

std::string last_torch_error() {
  using Getter = const char* (*)();
  static const Getter getter =
      reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* message = getter ? getter() : nullptr;
  return message ? std::string(": ") + message : std::string(" (torch's message is on stderr)");
}

std::string to_string(Place place) { return place.cuda ? "cuda:" + std::to_string(place.index) : "cpu"; }

std::string to_string(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return "?";
}

std::string shape_string(Span sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return aoti_torch_dtype_float32();
    case Dtype::kFloat64:
      return aoti_torch_dtype_float64();
    case Dtype::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::kFloat16:
      return aoti_torch_dtype_float16();
  }
  return -1;
}

std::string name_of_dtype(int32_t dtype) {
  const std::pair<int32_t, const char*> others[] = {
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
  };
  for (const auto& [code, name] : others) {
    if (code == dtype) return name;
  }
  for (const Dtype known : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (torch_dtype(known) == dtype) return to_string(known);
  }
  return "another one";
}

Described describe(const Tensor& tensor, const char* name) {
  Described described;
  described.tensor = &tensor;
  const AtenTensorHandle handle = tensor.get();
  int64_t ndim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0, device_type = 0;
  check_torch(aoti_torch_get_dim(handle, &ndim), name);
  check_torch(aoti_torch_get_sizes(handle, &sizes), name);
  check_torch(aoti_torch_get_strides(handle, &strides), name);
  check_torch(aoti_torch_get_dtype(handle, &dtype), name);
  check_torch(aoti_torch_get_device_type(handle, &device_type), name);
  check_torch(aoti_torch_get_device_index(handle, &described.place.index), name);
  described.sizes = Span(sizes, static_cast<size_t>(ndim));
  described.strides = Span(strides, static_cast<size_t>(ndim));
  for (const Dtype known : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat64}) {
    if (dtype == torch_dtype(known)) {
      described.dtype = known;
      described.place.cuda = device_type == aoti_torch_device_type_cuda();
      if (!described.place.cuda && device_type != aoti_torch_device_type_cpu()) {
        fail(name, ": expected a tensor on the CPU or a CUDA device");
      }
      check_torch(aoti_torch_get_data_ptr(handle, &described.pointer), name);
      expect_memory(tensor, described.sizes, described.strides, size_of(known), name);
      return described;
    }
  }
  fail(name, ": expected dtype float32, float64, bfloat16 or float16, got ", name_of_dtype(dtype));
}

void expect_memory(const Tensor& tensor, Span sizes, Span strides, int64_t element, const char* name) {
  const int64_t elements = reach(sizes, strides);
  if (elements == 0) return;
  void* first = nullptr;
  int64_t offset = 0, bytes = 0;
  check_torch(aoti_torch_get_data_ptr(tensor.get(), &first), name);
  check_torch(aoti_torch_get_storage_offset(tensor.get(), &offset), name);
  check_torch(aoti_torch_get_storage_size(tensor.get(), &bytes), name);
  const int64_t needed = (offset + elements) * element;
  const bool nowhere = reinterpret_cast<intptr_t>(first) == offset * element;  // an offset from a null pointer
  if (bytes >= needed && !nowhere) return;
  fail(name, ": expected a tensor of shape ", shape_string(sizes), " with memory, got one whose storage ",
       bytes == 0 ? "has been freed"
       : nowhere  ? "has none"
                  : "was cut to " + std::to_string(bytes) + " of " + std::to_string(needed) + " bytes");
}

Extent extent_of(const Described& tensor) {
  const char* begin = static_cast<const char*>(tensor.data());
  return {begin, begin + reach(tensor.sizes, tensor.strides) * size_of(tensor.dtype)};
}

Extent extent_of(const Tensor& flat) {
  const char* begin = static_cast<const char*>(flat.data_ptr());
  return {begin, begin + flat.numel() * static_cast<int64_t>(flat.element_size())};
}

Tensor empty_strided(Span sizes, Span strides, Dtype dtype, Place place) {
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(
                  static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch_dtype(dtype),
                  place.cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), place.index, &handle),
              "allocation");
  return Tensor(handle);
}

Tensor reshaped(const Tensor& tensor, Span sizes, Span strides) {
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                             strides.data(), 0, &handle),
              "view");
  return Tensor(handle);
}

Tensor owned(const Tensor& result) {
  const Described described = describe(result, "result");
  return reshaped(result, described.sizes, described.strides);
}

Tensor empty_like(const Described& like) {
  return empty_strided(like.sizes, dense_strides(like), like.dtype, like.place);
}

Tensor zeros_like(const Described& like) {
  Tensor result = empty_like(like);
  check_torch(aoti_torch_zero_(result.get()), "zero_");
  return result;
}

Tensor no_tensor(Dtype dtype, Place place) {
  const int64_t size = 0, stride = 1;
  return empty_strided(Span(&size, 1), Span(&stride, 1), dtype, place);
}

Ints contiguous_strides(Span sizes) {
  Ints strides(sizes.size());
  int64_t step = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = step;
    step *= std::max<int64_t>(sizes[dim], 1);
  }
  return strides;
}

int64_t reach(Span sizes, Span strides) {
  int64_t last = 0;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return 0;
    last += (sizes[dim] - 1) * strides[dim];
  }
  return last + 1;
}

bool channels_last(const Described& image) {
  if (image.ndim() != 4 || image.strides[1] == 0) return false;
  int64_t least = 0;  // what the next stride must at least be, from the innermost dimension out
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (image.sizes[dim] == 0 || image.strides[dim] < least) return false;
    if (dim == 0 && least == image.strides[1]) return false;  // [N, 1, 1, 1] is contiguous as well
    least = image.strides[dim] * std::max<int64_t>(image.sizes[dim], 1);
  }
  return true;
}

namespace {

// Walks the dimensions from the innermost; `holds(expected, got)` judges each stride.
template <class F>
bool every_stride(Span sizes, Span strides, const F& holds) {
  std::array<size_t, 64> order;
  size_t n = 0;
  for (size_t dim = 0; dim < sizes.size() && n < order.size(); ++dim) {
    if (sizes[dim] == 0) return true;
    if (sizes[dim] > 1) order[n++] = dim;
  }
  std::sort(order.begin(), order.begin() + n, [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t i = 0; i < n; ++i) {
    if (!holds(expected, strides[order[i]])) return false;
    expected = strides[order[i]] * sizes[order[i]];
  }
  return true;
}

}  // namespace

bool row_major(const Described& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t step = 1;
  for (int64_t dim = tensor.ndim() - 1; dim >= 0; --dim) {
    const size_t at = static_cast<size_t>(dim);
    if (tensor.sizes[at] != 1 && tensor.strides[at] != step) return false;
    step *= tensor.sizes[at];
  }
  return true;
}

bool is_dense(Span sizes, Span strides) {
  return every_stride(sizes, strides, [](int64_t expected, int64_t got) { return got == expected; });
}

bool overlaps(Span sizes, Span strides) {
  return !every_stride(sizes, strides, [](int64_t expected, int64_t got) { return got >= expected; });
}

Ints dense_strides(const Described& like) {
  if (is_dense(like.sizes, like.strides)) return Ints(like.strides.begin(), like.strides.end());
  return contiguous_strides(like.sizes);
}

}  // namespace taps
