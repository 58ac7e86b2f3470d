// Vectors of floats for the sources that are compiled once per instruction set, and the types that W and Delta have
// there. All of it has internal linkage: each instruction set has its own.
#pragma once

#include <cstring>

#include "cpu/isa.h"

namespace taps::cpu {
namespace {

// Of a vector. Sixteen run everywhere, two registers to a vector where they are narrower: tests do so.
#if !defined(TAPS_LANES)
#if defined(__AVX512F__)
#define TAPS_LANES 16
#elif defined(__AVX2__)
#define TAPS_LANES 8
#else
#define TAPS_LANES 4
#endif
#endif
constexpr int kLanes = TAPS_LANES;

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
inline To as(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <class V, class E>
inline V loaded(const E* from) {
  V result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline float widened(uint16_t bfloat16) { return as<float>(static_cast<uint32_t>(bfloat16) << 16); }

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// Operands by their type: kLanes elements, or the first `count` of them and zeros.
struct Float32 {
  using Element = float;
  static inline Vec load(const float* from) { return loaded<Vec>(from); }
};
struct BFloat16 {
  using Element = uint16_t;
  static inline Vec load(const uint16_t* from) {
    return as<Vec>(__builtin_convertvector(loaded<Halves>(from), Bits) << 16);
  }
};

template <class Type>
inline Vec load_part(const typename Type::Element* from, int64_t count) {
  typename Type::Element part[kLanes] = {};
  std::memcpy(part, from, static_cast<size_t>(count) * sizeof part[0]);
  return Type::load(part);
}

// To bf16 and back: to nearest, ties to even.
inline Vec to_bfloat16(Vec value) {
  const Bits bits = as<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const Bits not_a_number = as<Bits>(value != value);
  return as<Vec>((not_a_number & 0x7fc00000u) | (~not_a_number & rounded));
}

// kRound: the weight is rounded to bf16, as it is where x and y have that type.
template <class W_, class D_, bool kRound_>
struct Types {
  using W = W_;
  using D = D_;
  static constexpr bool kRound = kRound_;
  static inline Vec weight(Vec w, Vec d) { return kRound_ ? to_bfloat16(w + d) : w + d; }
};

// body(Types<...>) for a product's types.
template <class F>
inline void with_types(const LinearProduct& p, const F& body) {
  const bool narrow = p.delta_dtype != Dtype::kFloat32;
  if (p.compute == Dtype::kFloat32) {
    body(Types<Float32, Float32, false>());
  } else if (narrow) {
    body(Types<BFloat16, BFloat16, true>());
  } else if (p.weight_dtype == Dtype::kFloat32) {
    body(Types<Float32, Float32, true>());
  } else {
    body(Types<BFloat16, Float32, true>());
  }
}

}  // namespace
}  // namespace taps::cpu
