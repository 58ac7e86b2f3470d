// The conformance file on the twin, under several schedules.
#include "cuda/conformance.cuh"

#include "check.h"

using namespace taps::dev;  // NOLINT

TAPS_CASE(primitives_do_what_the_manual_says) {
  alignas(16) float source[256];
  for (int i = 0; i < 256; ++i) source[i] = static_cast<float>(i);
  for (uint64_t seed = 0; seed < 6; ++seed) {
    unsigned good[kConformanceChecks];
    for (unsigned& one : good) one = 1;
    const auto found = twin::launch({1, 1, 1}, 64, kConformanceShared, [&] { conformance(source, good); }, seed);
    if (!found.empty()) return host::none(found);
    for (unsigned i = 0; i < kConformanceChecks; ++i) {
      if (!good[i]) return "seed " + std::to_string(seed) + ": check " + std::to_string(i) + " failed";
    }
  }
  return "";
}

// Every half there is, there and back; and every bfloat16.
TAPS_CASE(sixteen_bit_types_round_trip) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float half = to_f32(f16{bits}), wide = to_f32(bf16{bits});
    if (half == half && from_f32<f16>(half).bits != bits) return "half " + std::to_string(i);
    if (wide == wide && from_f32<bf16>(wide).bits != bits) return "bfloat16 " + std::to_string(i);
  }
  return "";
}

int main() { return host::run_all(); }
