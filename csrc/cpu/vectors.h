// Vectors of floats for the sources that are compiled once per instruction set, and the types that W and Delta have
// there. All of it has internal linkage: each instruction set has its own.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"
#include "cpu/word.h"

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

// Whether bf16 is multiplied in pairs, as AVX-512's dot product does. Without the instruction it is written out, for
// tests.
#if !defined(TAPS_PAIRS)
#if defined(__AVX512BF16__)
#define TAPS_PAIRS 1
#else
#define TAPS_PAIRS 0
#endif
#endif
constexpr bool kPairs = TAPS_PAIRS;

#if TAPS_LANES == 16
constexpr int kTile = 12;  // rows: 24 sums, two of W_t and an element of x in 32 registers
#else
constexpr int kTile = 6;  // 12 sums, two of W_t and an element of x in 16
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = int8_t __attribute__((vector_size(kLanes)));

template <class V, class E>
inline V loaded(const E* from) {
  V result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// 32 bits in all lanes.
inline Vec in_all_lanes(const float* from) { return as<Vec>(loaded<uint32_t>(from) - Bits{}); }

// Lane i of the result is lane `from[i]` of `all`.
inline Bits picked(Bits all, Bits from) {
#if defined(__clang__)  // which knows constant patterns only
  Bits result;
  for (int i = 0; i < kLanes; ++i) result[i] = all[from[i]];
  return result;
#else
  return __builtin_shuffle(all, from);
#endif
}

// kLanes elements by their type, and where a row of Delta begins.
template <class E>
struct Plain {
  using Element = E;
  using Pointer = const E*;
  static constexpr bool kPacked = false;
  static inline Pointer begin(const LinearProduct& p, int64_t row) {
    return static_cast<const E*>(p.delta.data) + row * p.delta.ld;
  }
};
struct Float32 : Plain<float> {
  static inline Vec load(const float* from) { return loaded<Vec>(from); }
};
struct BFloat16 : Plain<uint16_t> {
  static inline Vec load(const uint16_t* from) {
#if defined(__AVX512F__)  // which gcc 12 would do by halves
    return as<Vec>(as<Bits>(_mm512_cvtepu16_epi32(loaded<__m256i>(from))) << 16);
#else
    return as<Vec>(__builtin_convertvector(loaded<Halves>(from), Bits) << 16);
#endif
  }
};

// A packed Delta's elements in row-major order from `at` on, whose rows are whole vectors. Scales up to 2^120,
// the largest that files hold, make every one exact in fp32.
template <class Packed>
struct Cursor {
  const uint8_t* codes;
  const void* values;
  int64_t at;
  float scale;  // of a row
  Cursor operator+(int64_t elements) const { return {codes, values, at + elements, scale}; }
};

template <class Packed>
struct InRegisters {
  using Element = void;
  using Pointer = Cursor<Packed>;
  static constexpr bool kPacked = true;
  static inline Pointer begin(const LinearProduct& p, int64_t row) {
    const float scale = Packed::kOfRow ? static_cast<const float*>(p.packed.values)[row] : 0.0f;
    return {static_cast<const uint8_t*>(p.packed.codes), p.packed.values, row * p.packed.columns, scale};
  }
};

// The scale of the group that `at` lies in, in all lanes.
template <class Packed>
inline Vec scale_at(const Cursor<Packed>& from) {
  return as<Vec>((static_cast<uint32_t>(static_cast<const uint16_t*>(from.values)[from.at / kScaleGroup]) << 16) -
                 Bits{});
}

inline Bits counted() {  // 0, 1, 2, ...
  Bits lanes;
  for (uint32_t i = 0; i < static_cast<uint32_t>(kLanes); ++i) lanes[i] = i;
  return lanes;
}

struct PackedInt8 : InRegisters<PackedInt8> {
  static constexpr int kBits = 8;
  static constexpr bool kOfRow = false;
  static inline Vec load(const Pointer& from) {
    const Bytes bytes = loaded<Bytes>(from.codes + from.at);
#if defined(__AVX512F__)
    const Ints codes = as<Ints>(_mm512_cvtepi8_epi32(as<__m128i>(bytes)));
#else
    const Ints codes = __builtin_convertvector(bytes, Ints);
#endif
    return __builtin_convertvector(codes, Vec) * scale_at(from);
  }
};

struct PackedInt4 : InRegisters<PackedInt4> {
  static constexpr int kBits = 4;
  static constexpr bool kOfRow = false;
  static inline Vec load(const Pointer& from) {
    uint32_t words[2] = {};  // of eight codes
    std::memcpy(words, from.codes + from.at / 2, kLanes / 2);
    Bits code = words[0] - Bits{};
    if constexpr (kLanes == 16) {
      for (int i = 8; i < kLanes; ++i) code[i] = words[1];
    }
    const Ints wide = as<Ints>(code << (28u - 4u * (counted() & 7u))) >> 28;
    return __builtin_convertvector(wide, Vec) * scale_at(from);
  }
};

struct PackedSign : InRegisters<PackedSign> {
  static constexpr int kBits = 1;
  static constexpr bool kOfRow = true;
  static inline Vec load(const Pointer& from) {
    uint16_t bits = from.codes[from.at / 8];
    if constexpr (kLanes == 16) std::memcpy(&bits, from.codes + from.at / 8, sizeof bits);
    const Bits word = static_cast<uint32_t>(bits >> from.at % 8) - Bits{};
    return as<Vec>(((word << (31u - counted())) & 0x80000000u) ^ (as<uint32_t>(from.scale) - Bits{}));
  }
};

// To bf16 and back: to nearest, ties to even.
inline Vec to_bfloat16(Vec value) {
  const Bits bits = as<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const Bits not_a_number = as<Bits>(value != value);
  return as<Vec>((not_a_number & 0x7fc00000u) | (~not_a_number & rounded));
}

inline Halves narrowed(Vec value) { return __builtin_convertvector(as<Bits>(to_bfloat16(value)) >> 16, Halves); }

// 2 * kLanes elements to bf16 as pairs, two of them in a lane. The instruction makes zeros of subnormals and keeps the
// bits of a NaN; everything else is rounded as above.
inline Vec to_pairs(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  return as<Vec>(_mm512_cvtne2ps_pbh(as<__m512>(second), as<__m512>(first)));
#else
  const Halves halves[2] = {narrowed(first), narrowed(second)};
  return as<Vec>(halves);
#endif
}

// Sums of fp32 and the products of two pairs each, the second elements' first. The instruction takes what is below
// the least normal number for zero.
inline Vec add_pairs(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  return as<Vec>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(a), as<__m512bh>(b)));
#else
  sum += as<Vec>(as<Bits>(a) & 0xffff0000u) * as<Vec>(as<Bits>(b) & 0xffff0000u);
  return sum + as<Vec>(as<Bits>(a) << 16) * as<Vec>(as<Bits>(b) << 16);
#endif
}

// How W_t and x are multiplied. kRound: W_t is rounded to bf16, as it is where x and y have that type. A lane holds a
// word of the depth (isa.h), so that a vector holds kStep elements.
template <class W_, class D_, bool kRound_>
struct Types {
  using W = W_;
  using D = D_;
  static constexpr bool kRound = kRound_;
  static constexpr int kInWord = kRound_ && kPairs ? 2 : 1;
  static constexpr int64_t kStep = kLanes * kInWord;

  static inline Vec weight(const typename W::Element* w, const typename D::Pointer& d) {
    const Vec first = W::load(w) + D::load(d);
    if constexpr (kInWord == 2) return to_pairs(first, W::load(w + kLanes) + D::load(d + kLanes));
    return kRound ? to_bfloat16(first) : first;
  }

  // The first `count` elements, and zeros.
  template <class E>
  static inline Vec weight(const typename W::Element* w, const E* d, int64_t count) {
    typename W::Element own_w[kStep] = {};
    E own_d[kStep] = {};
    std::memcpy(own_w, w, static_cast<size_t>(count) * sizeof own_w[0]);
    std::memcpy(own_d, d, static_cast<size_t>(count) * sizeof own_d[0]);
    return weight(own_w, own_d);
  }

  static inline Vec add(Vec sum, Vec weight, Vec x) {
    if constexpr (kInWord == 2) return add_pairs(sum, weight, x);
    return sum + weight * x;
  }
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

// The same of a packed Delta in registers, but for a bitmask, whose places depend on all bits before them.
template <class F>
inline void with_packed(const LinearProduct& p, const F& body) {
  if (p.packed.codec == Codec::kInt8) body(Types<Float32, PackedInt8, false>());
  if (p.packed.codec == Codec::kInt4) body(Types<Float32, PackedInt4, false>());
  if (p.packed.codec == Codec::kSign) body(Types<Float32, PackedSign, false>());
}

}  // namespace
}  // namespace taps::cpu
