// x as the products read it: words of 32 bits, each a float or, where the instruction set multiplies them so, two bf16.
#pragma once

#include <cstdint>
#include <cstring>

namespace taps::cpu {
namespace {  // it is also compiled for each instruction set

template <class To, class From>
inline To as(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

inline float widened(uint16_t bfloat16) { return as<float>(static_cast<uint32_t>(bfloat16) << 16); }

// How an activation's elements become words: kInWord of them, `Part`s of a word each.
struct Floats {
  using Element = float;
  using Part = float;
  static constexpr int kInWord = 1;
  static inline Part part(float element) { return element; }
};
struct WidenedBFloat16 {
  using Element = uint16_t;
  using Part = float;
  static constexpr int kInWord = 1;
  static inline Part part(uint16_t element) { return widened(element); }
};
struct PairsOfBFloat16 {
  using Element = uint16_t;
  using Part = uint16_t;
  static constexpr int kInWord = 2;
  static inline Part part(uint16_t element) { return element; }
};

}  // namespace
}  // namespace taps::cpu
