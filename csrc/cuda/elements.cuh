// Elements of any type, one by one or in vectors. Types are run-time values here: the branches are uniform over the
// grid and these kernels wait for memory, so one kernel serves what would be 64 instances.
#pragma once

#include "cuda/primitives.cuh"
#include "kernels.h"

namespace taps::dev {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements per thread and step: one access of 16 bytes for 16-bit types

TAPS_BOTH inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// T is what is computed in, float or double.
template <class T>
TAPS_DEVICE T load_one(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<T>(static_cast<const float*>(data)[at]);
    case Dtype::kFloat64:
      return static_cast<T>(static_cast<const double*>(data)[at]);
    case Dtype::kBFloat16:
      return static_cast<T>(to_f32(static_cast<const bf16*>(data)[at]));
    default:
      return static_cast<T>(to_f32(static_cast<const f16*>(data)[at]));
  }
}

// fp64 narrows to 16 bits through fp32, as torch's own cast does.
template <class T>
TAPS_DEVICE void store_one(void* data, Dtype dtype, int64_t at, T value) {
  switch (dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(data)[at] = static_cast<float>(value);
      return;
    case Dtype::kFloat64:
      static_cast<double*>(data)[at] = static_cast<double>(value);
      return;
    case Dtype::kBFloat16:
      static_cast<bf16*>(data)[at] = from_f32<bf16>(static_cast<float>(value));
      return;
    default:
      static_cast<f16*>(data)[at] = from_f32<f16>(static_cast<float>(value));
      return;
  }
}

// kVector elements from `at` on, which is a multiple of kVector; the data is 16-byte aligned.
template <class T>
TAPS_DEVICE void load_vector(const void* data, Dtype dtype, int64_t at, T (&to)[kVector]) {
  const char* const bytes = static_cast<const char*>(data) + at * size_of(dtype);
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Vec16 v = gld16_once(bytes + 16 * part);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[4 * part + i] = static_cast<T>(float_of(v.word[i]));
    }
  } else if (dtype == Dtype::kFloat64) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const Vec16 v = gld16_once(bytes + 16 * part);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        to[2 * part + i] = static_cast<T>(double_of(v.word[2 * i], v.word[2 * i + 1]));
      }
    }
  } else {
    const Vec16 v = gld16_once(bytes);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const auto half = static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16));
      to[i] = static_cast<T>(dtype == Dtype::kBFloat16 ? to_f32(bf16{half}) : to_f32(f16{half}));
    }
  }
}

template <class T>
TAPS_DEVICE void store_vector(void* data, Dtype dtype, int64_t at, const T (&from)[kVector]) {
  char* const bytes = static_cast<char*>(data) + at * size_of(dtype);
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      Vec16 v;
#pragma unroll
      for (int i = 0; i < 4; ++i) v.word[i] = bits_of(static_cast<float>(from[4 * part + i]));
      gst16(bytes + 16 * part, v);
    }
  } else if (dtype == Dtype::kFloat64) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const auto first = static_cast<double>(from[2 * part]), second = static_cast<double>(from[2 * part + 1]);
      gst16(bytes + 16 * part, {{low_of(first), high_of(first), low_of(second), high_of(second)}});
    }
  } else {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto low = static_cast<float>(from[2 * i]), high = static_cast<float>(from[2 * i + 1]);
      v.word[i] = dtype == Dtype::kBFloat16 ? pack<bf16>(low, high) : pack<f16>(low, high);
    }
    gst16(bytes, v);
  }
}

// Where each operand's element `index` lies, counted in a walk's own order.
template <int N>
TAPS_DEVICE void offsets_of(const Walk<N>& walk, int64_t index, int64_t (&offset)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) offset[k] = 0;
  for (int dim = walk.ndim - 1; dim >= 0; --dim) {
    const int64_t position = index % walk.sizes[dim];
    index /= walk.sizes[dim];
#pragma unroll
    for (int k = 0; k < N; ++k) offset[k] += position * walk.strides[k][dim];
  }
}

}  // namespace taps::dev
