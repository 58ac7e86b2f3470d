// The CPU's fused products with sixteen lanes, as AVX-512 has them, with and without products of pairs, on any machine:
// random problems against plain loops in fp64. What is read and written lies in allocations of its exact size.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/split.h"

namespace taps::cpu {
extern const FewRows few_rows_wide;
extern const Tiles tiles_wide;
}  // namespace taps::cpu

namespace {

using taps::Dtype;

std::mt19937 random_bits(1);

int64_t between(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(most - least + 1));
}

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(random_bits);
}

float rounded(float value) {  // to bf16, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A row-major array in fp32 or bf16, each row followed by a gap but for the last.
struct Array {
  Dtype dtype;
  int64_t ld;
  std::vector<float> values;
  std::unique_ptr<char[]> bytes;

  Array(Dtype dtype, int64_t rows, int64_t columns, int64_t gap) : dtype(dtype), ld(columns + gap) {
    const auto count = static_cast<size_t>((rows - 1) * ld + columns);
    const auto size = static_cast<size_t>(taps::size_of(dtype));
    values.resize(count);
    bytes = std::make_unique<char[]>(count * size);
    for (size_t i = 0; i < count; ++i) {
      values[i] = dtype == Dtype::kFloat32 ? normal() : rounded(normal());
      const char* from = reinterpret_cast<const char*>(&values[i]);
      std::memcpy(bytes.get() + i * size, dtype == Dtype::kFloat32 ? from : from + 2, size);
    }
  }
  // As the products read it: a float, or two bf16, the second one zero behind the end.
  float word(int64_t row, int64_t index, bool pairs, int64_t columns) const {
    if (!pairs) return values[static_cast<size_t>(row * ld + index)];
    uint16_t parts[2] = {};
    for (int64_t i = 0; i < 2 && 2 * index + i < columns; ++i) {
      std::memcpy(&parts[i], bytes.get() + (row * ld + 2 * index + i) * 2, 2);
    }
    float result;
    std::memcpy(&result, parts, 4);
    return result;
  }
  double at(int64_t row, int64_t column) const { return values[static_cast<size_t>(row * ld + column)]; }
  taps::Matrix matrix() const { return {bytes.get(), ld}; }
};

bool check(int64_t rows, int64_t outputs, int64_t inputs, int kind, bool tiled) {
  const Dtype compute = kind == 0 ? Dtype::kFloat32 : Dtype::kBFloat16;
  const Dtype w_kind = kind == 1 || kind == 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
  const Dtype d_kind = kind == 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
  const Array x(compute, rows, inputs, 0), w(w_kind, outputs, inputs, between(0, 5)),
      d(d_kind, outputs, inputs, between(0, 5)), bias(compute, 1, outputs, 0);
  const Array result(compute, rows, outputs, 0);
  taps::cpu::TileProduct p;
  p.rows = rows;
  p.outputs = outputs;
  p.inputs = inputs;
  p.compute = compute;
  p.weight = w.matrix();
  p.delta = d.matrix();
  p.weight_dtype = w_kind;
  p.delta_dtype = d_kind;
  p.bias = bias.bytes.get();
  p.result = result.bytes.get();
  const bool turned = tiled && between(0, 1);  // outputs side by side, or rows, as in an image
  p.ld_result = turned ? 1 : outputs;
  p.result_step = turned ? rows : 1;
  const bool pairs = kind != 0 && taps::cpu::tiles_wide.pairs;
  const int64_t words = pairs ? (inputs + 1) / 2 : inputs;
  std::vector<float> own;
  if (tiled) {
    own.resize(static_cast<size_t>(rows * words));
    const taps::cpu::Split split(rows, taps::cpu::tiles_wide.rows);
    float* to = own.data();
    for (int64_t part = 0; part < split.parts; ++part) {
      for (int64_t k = 0; k < words; ++k) {
        for (int64_t r = 0; r < split.size(part); ++r) *to++ = x.word(split.begin(part) + r, k, pairs, inputs);
      }
    }
    p.packed = own.data();
    taps::cpu::tiles_wide.run(p, 0, outputs);
  } else {
    const int64_t ld =
        (words + taps::cpu::kFewRowsPadding - 1) / taps::cpu::kFewRowsPadding * taps::cpu::kFewRowsPadding;
    own.resize(static_cast<size_t>(rows * ld));
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < words; ++k) own[static_cast<size_t>(m * ld + k)] = x.word(m, k, pairs, inputs);
    }
    taps::cpu::few_rows_wide(p, own.data(), ld, 0, outputs);
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = bias.at(0, n), size = std::fabs(sum);
      for (int64_t k = 0; k < inputs; ++k) {
        const float wt = static_cast<float>(w.at(n, k)) + static_cast<float>(d.at(n, k));
        const double term = x.at(m, k) * static_cast<double>(kind == 0 ? wt : rounded(wt));
        sum += term;
        size += std::fabs(term);
      }
      // Every addition and product errs by at most half a unit of what has been summed; the result is rounded once.
      const double bound = size * (inputs + 2) * 0x1p-24 + (kind == 0 ? 0.0 : std::fabs(sum) * 0x1p-8);
      const int64_t at = m * p.ld_result + n * p.result_step;
      float found = 0.0f;
      if (kind == 0) {
        std::memcpy(&found, result.bytes.get() + at * 4, 4);
      } else {
        std::memcpy(reinterpret_cast<char*>(&found) + 2, result.bytes.get() + at * 2, 2);
      }
      if (!(std::fabs(found - sum) <= bound)) {
        std::printf("%lld rows, %lld outputs, %lld inputs, types %d, %s: %g at (%lld, %lld), expected %g +- %g\n",
                    static_cast<long long>(rows), static_cast<long long>(outputs), static_cast<long long>(inputs), kind,
                    tiled ? "tiles" : "few rows", static_cast<double>(found), static_cast<long long>(m),
                    static_cast<long long>(n), sum, bound);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  int problems = 0;
  for (int round = 0; round < 12; ++round) {
    for (int kind = 0; kind < 4; ++kind) {
      const int64_t outputs = between(1, 70), inputs = round % 3 == 0 ? between(1, 40) : between(200, 600);
      if (!check(between(1, taps::cpu::kFewRows), outputs, inputs, kind, false)) return 1;
      if (!check(round == 0 ? taps::cpu::kTiledRows : between(1, 60), outputs, inputs, kind, true)) return 1;
      problems += 2;
    }
  }
  std::printf("%d problems\n", problems);
  return 0;
}
