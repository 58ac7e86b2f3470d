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

inline float widened(float value) { return value; }
inline float widened(uint16_t bfloat16) { return as<float>(static_cast<uint32_t>(bfloat16) << 16); }

// How kInWord elements of an activation become a word.
struct Floats {
  using Element = float;
  static constexpr int kInWord = 1;
  static uint32_t word(const float* elements) { return as<uint32_t>(elements[0]); }
};
struct WidenedBFloat16 {
  using Element = uint16_t;
  static constexpr int kInWord = 1;
  static uint32_t word(const uint16_t* elements) { return as<uint32_t>(widened(elements[0])); }
};
struct PairsOfBFloat16 {
  using Element = uint16_t;
  static constexpr int kInWord = 2;
  static uint32_t word(const uint16_t* elements) {
    return elements[0] | static_cast<uint32_t>(elements[1]) << 16;  // as they lie in memory
  }
};

}  // namespace
}  // namespace taps::cpu
