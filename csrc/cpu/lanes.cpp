// The loops over elements. Compiled once per instruction set with TAPS_ISA naming it; everything
// but the table at the end has internal linkage, so that no wider-than-allowed code leaks out.
//
// 16-bit operands pass through a block in L1 cache, fp32 and fp64 ones are used in place: one short
// loop per conversion instead of one kernel per combination of types.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/word.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace taps::cpu {
namespace {

constexpr int64_t kBlock = 1024;

inline uint32_t bits_of(float value) { return as<uint32_t>(value); }
inline float float_of(uint32_t bits) { return as<float>(bits); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_float16(uint16_t bits) {
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + (112u << 23);
  // Subnormals: let one subtraction renormalise them.
  const uint32_t subnormal = bits_of(float_of(shifted + (113u << 23)) - float_of(113u << 23));
  const uint32_t magnitude = exponent == 0x0f800000u ? shifted + (224u << 23) : exponent == 0 ? subnormal : normal;
  return float_of(magnitude | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal in fp16: adding 0.5 rounds in the right place
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

#if defined(__F16C__)
void float16_to_floats(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = from_float16(from[i]);
}

void floats_to_float16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_loadu_ps(from + i);
    // The instruction keeps a NaN's payload; the scalar tail does not: make them agree.
    const __m256 quiet = _mm256_blendv_ps(value, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                                          _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256 sign = _mm256_and_ps(value, _mm256_set1_ps(-0.0f));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_or_ps(quiet, sign), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) to[i] = to_float16(from[i]);
}
#else
void float16_to_floats(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float16(from[i]);
}

void floats_to_float16(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float16(from[i]);
}
#endif

template <class From, class To>
void convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// n elements from `offset` on, as T: in place where the type is T already, else through `buffer`.
template <class T>
const T* load(const void* data, Dtype dtype, int64_t offset, int64_t n, T* buffer);

template <>
const float* load(const void* data, Dtype dtype, int64_t offset, int64_t n, float* buffer) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(data) + offset;
    case Dtype::kBFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) buffer[i] = widened(from[i]);
      return buffer;
    }
    case Dtype::kFloat16:
      float16_to_floats(static_cast<const uint16_t*>(data) + offset, buffer, n);
      return buffer;
    case Dtype::kFloat64:  // the fp32 path is never chosen for fp64 operands; see in_double()
      convert(static_cast<const double*>(data) + offset, buffer, n);
      return buffer;
  }
  __builtin_unreachable();
}

template <>
const double* load(const void* data, Dtype dtype, int64_t offset, int64_t n, double* buffer) {
  if (dtype == Dtype::kFloat64) return static_cast<const double*>(data) + offset;
  float narrow[kBlock];
  convert(load<float>(data, dtype, offset, n, narrow), buffer, n);
  return buffer;
}

void store(const float* from, void* out, Dtype dtype, int64_t offset, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat32:
      std::memmove(static_cast<float*>(out) + offset, from, static_cast<size_t>(n) * 4);
      return;
    case Dtype::kBFloat16: {
      uint16_t* to = static_cast<uint16_t*>(out) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
      return;
    }
    case Dtype::kFloat16:
      floats_to_float16(from, static_cast<uint16_t*>(out) + offset, n);
      return;
    case Dtype::kFloat64:
      convert(from, static_cast<double*>(out) + offset, n);
      return;
  }
}

// fp64 narrows through fp32, as torch's own cast does.
void store(const double* from, void* out, Dtype dtype, int64_t offset, int64_t n) {
  if (dtype == Dtype::kFloat64) {
    std::memmove(static_cast<double*>(out) + offset, from, static_cast<size_t>(n) * 8);
    return;
  }
  float narrow[kBlock];
  convert(from, narrow, n);
  store(narrow, out, dtype, offset, n);
}

// Strided operands are gathered into (scattered from) a contiguous block of their own type.
void copy_strided(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t size, int64_t n) {
  char* to_bytes = static_cast<char*>(to);
  const char* from_bytes = static_cast<const char*>(from);
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(to_bytes + i * to_stride * size, from_bytes + i * from_stride * size, static_cast<size_t>(size));
  }
}

template <class T>
const T* load(Run run, int64_t offset, int64_t n, T* buffer, double* gathered) {
  if (run.stride == 1) return load<T>(run.data, run.dtype, offset, n, buffer);
  const int64_t size = size_of(run.dtype);
  copy_strided(gathered, 1, static_cast<const char*>(run.data) + offset * run.stride * size, run.stride, size, n);
  return load<T>(gathered, run.dtype, 0, n, buffer);
}

// An output may be one of the inputs, element for element, hence ivdep instead of restrict.
template <class T>
void combine(const T* weight, const T* delta, T scale, T* out, int64_t n) {
  if (weight && delta) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = weight[i] + delta[i];
  } else if (const T* only = weight ? weight : delta) {
    if (only != out) std::memmove(out, only, static_cast<size_t>(n) * sizeof(T));
  } else {
    std::memset(out, 0, static_cast<size_t>(n) * sizeof(T));
  }
  if (scale != T(1)) {
    for (int64_t i = 0; i < n; ++i) out[i] *= scale;
  }
}

template <class T>
void reconstruct_as(Dtype native, void* out, Dtype out_dtype, int64_t out_stride, Run weight, Run delta, double scale,
                    int64_t n) {
  T weight_block[kBlock], delta_block[kBlock], out_block[kBlock];
  double gathered_weight[kBlock], gathered_delta[kBlock], scattered[kBlock];
  const bool direct = out_dtype == native && out_stride == 1;
  const auto in_place = [&](Run run) { return !run.data || (run.dtype == native && run.stride == 1); };
  if (direct && in_place(weight) && in_place(delta)) {
    combine(static_cast<const T*>(weight.data), static_cast<const T*>(delta.data), static_cast<T>(scale),
            static_cast<T*>(out), n);
    return;
  }
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    const T* w = weight.data ? load<T>(weight, i, m, weight_block, gathered_weight) : nullptr;
    const T* d = delta.data ? load<T>(delta, i, m, delta_block, gathered_delta) : nullptr;
    if (direct) {
      combine(w, d, static_cast<T>(scale), static_cast<T*>(out) + i, m);
    } else {
      combine(w, d, static_cast<T>(scale), out_block, m);
      if (out_stride == 1) {
        store(out_block, out, out_dtype, i, m);
      } else {
        const int64_t size = size_of(out_dtype);
        store(out_block, scattered, out_dtype, 0, m);
        copy_strided(static_cast<char*>(out) + i * out_stride * size, out_stride, scattered, 1, size, m);
      }
    }
  }
}

template <class W, class D>
void add_to_bfloat16(const W* weight, const D* delta, uint16_t* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(widened(weight[i]) + widened(delta[i]));
}

// Both, in bf16 or fp32, to bf16: in registers, where most layers of bf16 models are rebuilt.
void add_to_bfloat16(uint16_t* out, Run weight, Run delta, int64_t n) {
  const auto with = [&](const auto* w) {
    if (delta.dtype == Dtype::kFloat32) return add_to_bfloat16(w, static_cast<const float*>(delta.data), out, n);
    add_to_bfloat16(w, static_cast<const uint16_t*>(delta.data), out, n);
  };
  if (weight.dtype == Dtype::kFloat32) return with(static_cast<const float*>(weight.data));
  with(static_cast<const uint16_t*>(weight.data));
}

void reconstruct(void* out, Dtype out_dtype, int64_t out_stride, Run weight, Run delta, double scale, bool in_double,
                 int64_t n) {
  const auto known = [](Run run) {
    return run.data && run.stride == 1 && (run.dtype == Dtype::kBFloat16 || run.dtype == Dtype::kFloat32);
  };
  if (out_dtype == Dtype::kBFloat16 && out_stride == 1 && scale == 1.0 && known(weight) && known(delta)) {
    add_to_bfloat16(static_cast<uint16_t*>(out), weight, delta, n);
  } else if (in_double) {
    reconstruct_as<double>(Dtype::kFloat64, out, out_dtype, out_stride, weight, delta, scale, n);
  } else {
    reconstruct_as<float>(Dtype::kFloat32, out, out_dtype, out_stride, weight, delta, scale, n);
  }
}

template <class A, class B>
void dot_block(const A* a, const B* b, int64_t n, double* sums) {
  double lane[kDotSums];
  std::memcpy(lane, sums, sizeof lane);
  int64_t i = 0;
  for (; i + kDotSums <= n; i += kDotSums) {
    for (int j = 0; j < kDotSums; ++j) {
      lane[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
    }
  }
  for (int j = 0; i < n; ++i, ++j) {
    lane[j] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  std::memcpy(sums, lane, sizeof lane);
}

void dot(Run a, Run b, int64_t n, double* sums) {
  double gathered_a[kBlock], gathered_b[kBlock];
  const bool in_double = a.dtype == Dtype::kFloat64 || b.dtype == Dtype::kFloat64;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    if (in_double) {
      double a_block[kBlock], b_block[kBlock];
      dot_block(load<double>(a, i, m, a_block, gathered_a), load<double>(b, i, m, b_block, gathered_b), m, sums);
    } else {
      float a_block[kBlock], b_block[kBlock];
      dot_block(load<float>(a, i, m, a_block, gathered_a), load<float>(b, i, m, b_block, gathered_b), m, sums);
    }
  }
}

// x - x is 0 for a finite x and NaN otherwise, so that every difference must be 0.
template <class T>
bool finite_block(const T* values, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= values[i] - values[i] == T(0);
  return finite;
}

bool all_finite(Run run, int64_t n) {
  double gathered[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    if (run.dtype == Dtype::kFloat64) {
      double block[kBlock];
      if (!finite_block(load<double>(run, i, m, block, gathered), m)) return false;
    } else {
      float block[kBlock];
      if (!finite_block(load<float>(run, i, m, block, gathered), m)) return false;
    }
  }
  return true;
}

// --- packed Deltas: every product is exact in fp32 ------------------------------------------------

void decode_int8(const PackedDelta& delta, int64_t begin, int64_t n, float* to) {
  const int8_t* codes = static_cast<const int8_t*>(delta.codes) + begin;
  const uint16_t* scales = static_cast<const uint16_t*>(delta.values) + begin / kScaleGroup;
  int64_t i = 0;
  for (; i + kScaleGroup <= n; i += kScaleGroup) {
    const float scale = widened(scales[i / kScaleGroup]);
    for (int64_t j = 0; j < kScaleGroup; ++j) to[i + j] = static_cast<float>(codes[i + j]) * scale;
  }
  for (; i < n; ++i) to[i] = static_cast<float>(codes[i]) * widened(scales[i / kScaleGroup]);
}

using Bytes = uint8_t __attribute__((vector_size(kScaleGroup / 2)));

// Eight bytes of each from kFirst on, in turn.
template <int kFirst>
inline Bytes in_turn(Bytes low, Bytes high) {
  constexpr int k = kFirst;
#if defined(__clang__)
  return __builtin_shufflevector(low, high, k, k + 16, k + 1, k + 17, k + 2, k + 18, k + 3, k + 19, k + 4, k + 20,
                                 k + 5, k + 21, k + 6, k + 22, k + 7, k + 23);
#else
  return __builtin_shuffle(low, high,
                           Bytes{k, k + 16, k + 1, k + 17, k + 2, k + 18, k + 3, k + 19, k + 4, k + 20, k + 5, k + 21,
                                 k + 6, k + 22, k + 7, k + 23});
#endif
}

void decode_int4(const PackedDelta& delta, int64_t begin, int64_t n, float* to) {
  const uint8_t* codes = static_cast<const uint8_t*>(delta.codes) + begin / 2;
  const uint16_t* scales = static_cast<const uint16_t*>(delta.values) + begin / kScaleGroup;
  int64_t i = 0;
  for (; i + kScaleGroup <= n; i += kScaleGroup) {
    const float scale = widened(scales[i / kScaleGroup]);
    Bytes byte;
    std::memcpy(&byte, codes + i / 2, sizeof byte);
    const Bytes low = ((byte & 15) ^ 8) - 8, high = ((byte >> 4) ^ 8) - 8;
    const Bytes pairs[2] = {in_turn<0>(low, high), in_turn<8>(low, high)};
    int8_t wide[kScaleGroup];
    std::memcpy(wide, pairs, sizeof wide);
    for (int64_t j = 0; j < kScaleGroup; ++j) to[i + j] = static_cast<float>(wide[j]) * scale;
  }
  for (; i < n; ++i) to[i] = static_cast<float>(nibble_of(codes, i)) * widened(scales[i / kScaleGroup]);
}

// The signs of a block first, for they begin at a byte there, then each row's scale.
void decode_sign(const PackedDelta& delta, int64_t begin, int64_t n, float* to) {
  const uint8_t* signs = static_cast<const uint8_t*>(delta.codes) + begin / 8;
  const float* scales = static_cast<const float*>(delta.values);
  uint32_t sign[kBlock];
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint32_t byte = signs[i / 8];
    for (uint32_t j = 0; j < 8; ++j) sign[i + j] = (byte >> j) << 31;
  }
  for (; i < n; ++i) sign[i] = bit_of(signs, i) ? 0x80000000u : 0u;
  for (i = 0; i < n;) {
    const int64_t row = (begin + i) / delta.columns, left = (row + 1) * delta.columns - begin;
    const int64_t end = left < n ? left : n;
    const uint32_t scale = bits_of(scales[row]);
    for (; i < end; ++i) to[i] = float_of(scale ^ sign[i]);
  }
}

void decode_bitmask(const PackedDelta& delta, int64_t begin, int64_t n, int64_t rank, float* to) {
  const uint8_t* bits = static_cast<const uint8_t*>(delta.codes) + begin / 8;
  const float* values = static_cast<const float*>(delta.values) + rank;
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    uint16_t mask;
    std::memcpy(&mask, bits + i / 8, sizeof mask);
    _mm512_storeu_ps(to + i, _mm512_maskz_expandloadu_ps(mask, values));
    values += __builtin_popcount(mask);
  }
#endif
  for (; i < n; ++i) {
    const bool there = bit_of(bits, i);
    to[i] = there ? *values : 0.0f;
    values += there;
  }
}

// In blocks of no more than kBlock.
void decode(const PackedDelta& delta, int64_t begin, int64_t n, int64_t rank, float* to) {
  switch (delta.codec) {
    case Codec::kBitmask:
      return decode_bitmask(delta, begin, n, rank, to);
    case Codec::kInt8:
      return decode_int8(delta, begin, n, to);
    case Codec::kInt4:
      return decode_int4(delta, begin, n, to);
    case Codec::kSign:
      return decode_sign(delta, begin, n, to);
  }
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const Lanes TAPS_CONCAT(lanes_, TAPS_ISA);
const Lanes TAPS_CONCAT(lanes_, TAPS_ISA) = {&reconstruct, &dot, &all_finite, &decode};

}  // namespace taps::cpu
