// What the primitives of twin.h do beyond reading and writing: 16-bit floats, ldmatrix and mma as the PTX manual
// lays them out.
#include <cmath>

#include "twin.h"

namespace taps::dev {

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) return float_of(sign | bits_of(std::ldexp(static_cast<float>(mantissa), -24)));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;  // the device's
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 6.103515625e-05f) {  // subnormal: in steps of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))));
  }
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

Vec16 gld16_once(const void* p, const char* file, int line) {
  const twin::Where where{file, line};
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) twin::report("misaligned", "a load of 16 bytes", where);
  Vec16 value;
  std::memcpy(&value, p, 16);
  return value;
}

void gst16(void* p, Vec16 value, const char* file, int line) {
  const twin::Where where{file, line};
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) twin::report("misaligned", "a store of 16 bytes", where);
  std::memcpy(p, &value, 16);
}

void load_matrices(uint32_t (&r)[4], uint32_t at, bool transposed, twin::Where where) {
  uint16_t row[8];
  twin::read(at, row, 16, where);  // the lane that gives the address reads the row
  const unsigned char* all = twin::exchange(transposed ? "ldmatrix.trans" : "ldmatrix", row, 16, where);
  const auto element = [&](unsigned matrix, unsigned i, unsigned j) {
    uint16_t value;
    std::memcpy(&value, all + (matrix * 8 + i) * 16 + j * 2, 2);
    return static_cast<uint32_t>(value);
  };
  const unsigned group = lane() / 4, pair = 2 * (lane() % 4);
  for (unsigned m = 0; m < 4; ++m) {
    const uint32_t low = transposed ? element(m, pair, group) : element(m, group, pair);
    const uint32_t high = transposed ? element(m, pair + 1, group) : element(m, group, pair + 1);
    r[m] = low | (high << 16);
  }
}

void multiply(Operand kind, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], twin::Where where) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* all = twin::exchange("mma", mine, sizeof(mine), where);
  const auto word = [&](unsigned of_lane, unsigned i) {
    uint32_t value;
    std::memcpy(&value, all + of_lane * sizeof(mine) + i * 4, 4);
    return value;
  };
  const auto half = [&](uint32_t bits, unsigned which) {
    const auto part = static_cast<uint16_t>(which ? bits >> 16 : bits);
    return kind == Operand::kBFloat16 ? to_f32(bf16{part}) : to_f32(f16{part});
  };
  // The owner of A (row, k) and B (k, column), as the PTX manual lays them out.
  const auto of_a = [&](unsigned row, unsigned k) {
    const unsigned down = row / 8;
    if (kind == Operand::kTf32) return float_of(word(row % 8 * 4 + k % 4, down + 2 * (k / 4)));
    return half(word(row % 8 * 4 + k % 8 / 2, down + 2 * (k / 8)), k % 2);
  };
  const auto of_b = [&](unsigned k, unsigned column) {
    if (kind == Operand::kTf32) return float_of(word(column * 4 + k % 4, 4 + k / 4));
    return half(word(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
  };
  const unsigned depth = kind == Operand::kTf32 ? 8 : 16;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < depth; ++k) sum += static_cast<double>(of_a(row, k)) * of_b(k, column);
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace taps::dev
