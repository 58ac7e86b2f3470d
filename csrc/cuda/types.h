// The plain types of the device primitives, for nvcc and for the twin.
#pragma once

#include <cstdint>

namespace taps::dev {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct alignas(16) Vec16 {
  uint32_t word[4];
};
// Two neighbours, read together.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T x, y;
};

}  // namespace taps::dev
