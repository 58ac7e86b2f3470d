// The CPU's loops over packed Deltas and patches under inputs of every kind, honest and hostile: random shapes, codes,
// scales, bits and indices in allocations of their exact size, each instruction set that this machine runs, against
// loops that take one element after the other. Compiled with sanitizers it is what `make fuzz` runs.
//
//     codecs KERNEL COUNT SEED     KERNEL: bitmask, int8, int4, sign, encode, few_rows or patch
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/patch.h"
#include "cpu/word.h"

// In place of libtorch's: two halves, one after the other.
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body, void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  body(begin, middle, context);
  body(middle, end, context);
  return 0;
}

namespace taps::cpu {

extern const Lanes lanes_baseline;
extern const Encoders encoders_baseline;
extern const FewRows few_rows_baseline;
#ifdef TAPS_HAVE_AVX2
extern const Lanes lanes_avx2;
extern const Encoders encoders_avx2;
extern const FewRows few_rows_avx2;
#endif
#ifdef TAPS_HAVE_AVX512
extern const Lanes lanes_avx512;
extern const Encoders encoders_avx512;
extern const FewRows few_rows_avx512;
#endif

namespace {

struct Set {
  const Lanes* lanes;
  const Encoders* encoders;
  FewRows few_rows;
};

std::vector<Set> sets() {
  std::vector<Set> found = {{&lanes_baseline, &encoders_baseline, few_rows_baseline}};
#ifdef TAPS_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")) {
    found.push_back({&lanes_avx2, &encoders_avx2, few_rows_avx2});
  }
#endif
#ifdef TAPS_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back({&lanes_avx512, &encoders_avx512, few_rows_avx512});
  }
#endif
  return found;
}

Set chosen;

}  // namespace

const Lanes& lanes() { return *chosen.lanes; }
const Encoders& encoders() { return *chosen.encoders; }

}  // namespace taps::cpu

namespace {

using namespace taps;

std::mt19937_64 random_bits;

int64_t between(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(most - least + 1));
}

// Memory of its exact size, so that a byte beyond it is an error.
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  int64_t count;
  explicit Exact(int64_t count) : data(new T[static_cast<size_t>(count)]), count(count) {}
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
};

template <class T>
Exact<T> noise(int64_t count) {
  Exact<T> made(count);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 8) {
    const uint64_t bits = random_bits();
    std::memcpy(reinterpret_cast<char*>(made.data.get()) + i, &bits,
                static_cast<size_t>(std::min<int64_t>(8, count * static_cast<int64_t>(sizeof(T)) - i)));
  }
  return made;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The same number, any NaN being any other.
bool alike(float one, float other) {
  return (one != one && other != other) || std::memcmp(&one, &other, sizeof one) == 0;
}

struct Shape {
  int64_t rows, columns;
};

// Mostly small, at times several blocks; nothing at all too.
Shape random_shape() {
  const int64_t kind = between(0, 9);
  const int64_t most = kind == 0 ? 3000 : kind < 4 ? 300 : 40;
  const int64_t rows = between(0, kind % 2 ? most : 8), columns = between(0, kind % 2 ? 8 : most);
  return {rows, columns};
}

[[noreturn]] void wrong(const char* kernel, const std::string& what) {
  std::printf("FAILED %s: %s\n", kernel, what.c_str());
  std::exit(1);
}

// --- W + Delta --------------------------------------------------------------------------------------

void unpack_once(Codec codec, const char* name) {
  const Shape shape = random_shape();
  const int64_t numel = shape.rows * shape.columns;
  const bool bits = codec == Codec::kBitmask || codec == Codec::kSign;
  Exact<uint8_t> codes = noise<uint8_t>(bits ? (numel + 7) / 8 : codec == Codec::kInt4 ? (numel + 1) / 2 : numel);
  if (codec == Codec::kBitmask && between(0, 2) == 0) {  // few bits
    for (int64_t i = 0; i < codes.count; ++i) codes[i] &= static_cast<uint8_t>(random_bits() & random_bits());
  }
  const int64_t set = cpu::count_bits(codes.data.get(), codes.count);
  int64_t plain = 0;
  for (int64_t i = 0; i < 8 * codes.count; ++i) plain += bit_of(codes.data.get(), i);
  if (set != plain) wrong(name, "expected " + std::to_string(plain) + " bits, counted " + std::to_string(set));
  // What the operator refuses, a bitmap with another number of bits than values, does not come to the kernel.
  const int64_t count = codec == Codec::kBitmask ? set : bits ? shape.rows : (numel + kScaleGroup - 1) / kScaleGroup;
  Exact<float> floats = noise<float>(bits ? count : 0);
  Exact<uint16_t> scales = noise<uint16_t>(bits ? 0 : count);  // any bfloat16: NaN, negative, too large
  PackedDelta delta;
  delta.codec = codec;
  delta.codes = codes.data.get();
  delta.values = bits ? static_cast<const void*>(floats.data.get()) : scales.data.get();
  delta.rows = shape.rows;
  delta.columns = shape.columns;
  delta.kept = codec == Codec::kBitmask ? count : 0;

  Unpack args;
  args.delta = delta;
  Exact<float> weight = noise<float>(numel), out(numel);
  const bool alone = between(0, 3) == 0;
  args.weight = alone ? nullptr : weight.data.get();
  args.weight_dtype = Dtype::kFloat32;
  args.out = out.data.get();
  args.out_dtype = Dtype::kFloat32;
  if (numel > 0) cpu::unpack(args);

  for (int64_t i = 0, rank = 0; i < numel; ++i) {
    float value = 0.0f;
    if (codec == Codec::kBitmask) {
      if (bit_of(codes.data.get(), i)) value = floats[rank++];
    } else if (codec == Codec::kSign) {
      uint32_t scale;
      std::memcpy(&scale, &floats[i / shape.columns], sizeof scale);
      value = float_of(scale ^ (bit_of(codes.data.get(), i) ? 0x80000000u : 0u));
    } else {
      const int code = codec == Codec::kInt8 ? static_cast<int8_t>(codes[i]) : nibble_of(codes.data.get(), i);
      value = static_cast<float>(code) * float_of(static_cast<uint32_t>(scales[i / kScaleGroup]) << 16);
    }
    const float want = alone ? value : weight[i] + value;
    if (!alike(out[i], want) && !(alone && out[i] == 0.0f && want == 0.0f)) {
      wrong(name, "element " + std::to_string(i) + " of " + std::to_string(numel));
    }
  }
}

// --- Delta to codes ---------------------------------------------------------------------------------

float widened(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

uint16_t nearest_bfloat16(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

double folded(std::vector<double> values) {
  for (size_t width = values.size() / 2; width > 0; width /= 2) {
    for (size_t j = 0; j < width; ++j) values[j] += values[j + width];
  }
  return values[0];
}

// A group's scale and codes, one element after the other.
struct Coded {
  uint16_t scale = 0;
  double error = INFINITY;
  std::vector<int> codes;
};

Coded coded(const std::vector<double>& group, uint16_t scale, int most) {
  Coded made{scale, 0.0, {}};
  const double step = widened(scale), steps = scale == 0 ? 0.0 : 1.0 / step;
  std::vector<double> lost;
  for (const double value : group) {
    const double code = std::nearbyint(std::max(-1.0 * most, std::min(1.0 * most, value * steps)));
    made.codes.push_back(static_cast<int>(code));
    lost.push_back((value - code * step) * (value - code * step));
  }
  made.error = folded(lost);
  return made;
}

Coded best_of(const std::vector<double>& group, int most) {
  double peak = 0.0;
  for (const double value : group) peak = std::max(peak, std::fabs(value));
  uint16_t first = nearest_bfloat16(peak / most);
  first = static_cast<uint16_t>(first + (widened(first) * (most + 0.5) < peak));
  Coded best = coded(group, first, most);
  for (const double factor : {0.95, 0.9, 0.85, 0.8, 0.75, 0.7}) {
    if (most != 7) break;
    Coded tried = coded(group, nearest_bfloat16(factor * peak / most), most);
    if (tried.error < best.error) best = tried;
  }
  return best;
}

void encode_once() {
  const Codec codec = static_cast<Codec>(between(0, 3));
  const Shape shape = random_shape();
  const int64_t numel = shape.rows * shape.columns;
  Exact<float> delta = noise<float>(numel);
  const int64_t kind = between(0, 4);
  for (int64_t i = 0; i < numel; ++i) {
    if (kind == 0) {  // any bits: of every size, mostly finite, now and then all
      if (i % 2 || std::isfinite(delta[i])) continue;
    }
    delta[i] = kind == 1 ? static_cast<float>(between(-3, 3)) : std::ldexp(static_cast<float>(between(-999, 999)), -9);
    if (kind == 2 && between(0, 2)) delta[i] = between(0, 1) ? 0.0f : -0.0f;
  }
  int64_t not_zero = 0, sized = 0;
  bool finite = true;
  double peak = 0.0;
  for (int64_t i = 0; i < numel; ++i) {
    not_zero += delta[i] != 0.0f || std::signbit(delta[i]);
    sized += delta[i] != 0.0f;
    finite = finite && std::isfinite(delta[i]);
    peak = std::max(peak, std::fabs(static_cast<double>(delta[i])));
  }
  Encode args;
  args.delta = delta.data.get();
  args.codec = codec;
  args.rows = shape.rows;
  args.columns = shape.columns;
  const bool bits = codec == Codec::kBitmask || codec == Codec::kSign;
  const bool all = between(0, 1) == 0;
  args.kept = codec == Codec::kBitmask ? (all ? not_zero : between(0, numel + 1)) : 0;
  Exact<uint8_t> codes = noise<uint8_t>(bits ? (numel + 7) / 8 : codec == Codec::kInt4 ? (numel + 1) / 2 : numel);
  Exact<float> floats(codec == Codec::kBitmask ? args.kept : codec == Codec::kSign ? shape.rows : 0);
  Exact<uint16_t> scales(bits ? 0 : (numel + kScaleGroup - 1) / kScaleGroup);
  args.codes = codes.data.get();
  args.values = bits ? static_cast<void*>(floats.data.get()) : scales.data.get();
  const bool held = cpu::encode(args);
  bool want = finite;
  if (codec == Codec::kBitmask) want = finite && (args.kept == not_zero || args.kept <= sized);
  const int most = codec == Codec::kInt8 ? 127 : 7;
  if (!bits) want = finite && peak <= std::ldexp(static_cast<double>(most), 120);
  if (held != want) wrong("encode", want ? "values that a codec holds were refused" : "others were taken");
  if (!held) return;

  if (codec == Codec::kBitmask) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < numel; ++i) {
      if (args.kept == not_zero ? delta[i] != 0.0f || std::signbit(delta[i]) : delta[i] != 0.0f) order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return std::fabs(delta[a]) > std::fabs(delta[b]); });
    order.resize(static_cast<size_t>(args.kept));
    std::sort(order.begin(), order.end());
    for (int64_t i = 0, rank = 0; i < 8 * codes.count; ++i) {
      const bool there = rank < args.kept && order[static_cast<size_t>(rank)] == i;
      if (bit_of(codes.data.get(), i) != there) wrong("encode", "another choice of elements");
      if (there && !alike(floats[rank++], delta[i])) wrong("encode", "a value that is not the element's");
    }
    return;
  }
  if (codec == Codec::kSign) {
    for (int64_t row = 0; row < shape.rows; ++row) {
      std::vector<double> sums(16);
      for (int64_t k = 0; k < shape.columns; ++k) {
        sums[static_cast<size_t>(k % 16)] += std::fabs(static_cast<double>(delta[row * shape.columns + k]));
      }
      const double mean = shape.columns ? folded(sums) / static_cast<double>(shape.columns) : 0.0;
      if (!alike(floats[row], static_cast<float>(mean))) wrong("encode", "a scale that is not the row's mean");
    }
    for (int64_t i = 0; i < 8 * codes.count; ++i) {
      if (bit_of(codes.data.get(), i) != (i < numel && delta[i] < 0.0f)) wrong("encode", "a wrong sign");
    }
    return;
  }
  for (int64_t first = 0; first < numel; first += kScaleGroup) {
    std::vector<double> group(kScaleGroup);
    for (int64_t j = 0; j < kScaleGroup && first + j < numel; ++j) group[static_cast<size_t>(j)] = delta[first + j];
    const Coded best = best_of(group, most);
    if (scales[first / kScaleGroup] != best.scale) wrong("encode", "another scale");
    for (int64_t j = 0; j < kScaleGroup && first + j < numel; ++j) {
      const int64_t i = first + j;
      const int code = most == 127 ? static_cast<int8_t>(codes[i]) : nibble_of(codes.data.get(), i);
      if (code != best.codes[static_cast<size_t>(j)]) wrong("encode", "another code");
    }
  }
}

// --- few rows ---------------------------------------------------------------------------------------

// Decoded in registers, against the same kernel over the decoded Delta: to the bit.
void few_rows_once() {
  const Codec codec = static_cast<Codec>(between(1, 3));
  const int64_t outputs = between(1, 11), inputs = 64 * between(1, 6), rows = between(1, cpu::kFewRows);
  const int64_t numel = outputs * inputs, groups = numel / kScaleGroup;
  Exact<uint8_t> codes = noise<uint8_t>(codec == Codec::kInt8 ? numel : codec == Codec::kInt4 ? numel / 2 : numel / 8);
  Exact<uint16_t> scales = noise<uint16_t>(codec == Codec::kSign ? 0 : groups);
  for (int64_t i = 0; i < scales.count; ++i) scales[i] = static_cast<uint16_t>(scales[i] % 0x4b00);  // up to 2^23
  Exact<float> row_scales(codec == Codec::kSign ? outputs : 0), weight(numel), x(rows * inputs), delta(numel);
  for (int64_t i = 0; i < row_scales.count; ++i) row_scales[i] = static_cast<float>(between(0, 99)) / 7.0f;
  for (int64_t i = 0; i < numel; ++i) weight[i] = static_cast<float>(between(-999, 999)) / 64.0f;
  for (int64_t i = 0; i < x.count; ++i) x[i] = static_cast<float>(between(-999, 999)) / 128.0f;
  LinearProduct args;
  args.rows = rows;
  args.outputs = outputs;
  args.inputs = inputs;
  args.compute = args.weight_dtype = args.delta_dtype = Dtype::kFloat32;
  args.gate.open = true;
  args.weight = {weight.data.get(), inputs};
  args.packed.codec = codec;
  args.packed.codes = codes.data.get();
  args.packed.values = codec == Codec::kSign ? static_cast<const void*>(row_scales.data.get()) : scales.data.get();
  args.packed.rows = outputs;
  args.packed.columns = inputs;
  Exact<float> bias(outputs), packed(rows * outputs), dense(rows * outputs);
  for (int64_t i = 0; i < outputs; ++i) bias[i] = static_cast<float>(between(-9, 9));
  args.bias = between(0, 1) ? bias.data.get() : nullptr;
  args.ld_result = outputs;
  args.result = packed.data.get();
  cpu::chosen.few_rows(args, x.data.get(), inputs, 0, outputs);
  for (int64_t at = 0; at < numel; at += 1024) {
    cpu::lanes_baseline.decode(args.packed, at, std::min<int64_t>(1024, numel - at), 0, delta.data.get() + at);
  }
  args.packed = {};
  args.delta = {delta.data.get(), inputs};
  args.result = dense.data.get();
  cpu::chosen.few_rows(args, x.data.get(), inputs, 0, outputs);
  for (int64_t i = 0; i < dense.count; ++i) {
    if (!alike(packed[i], dense[i])) wrong("few_rows", "another result than with the decoded Delta");
  }
}

// --- patches ----------------------------------------------------------------------------------------

int64_t read_code(const uint8_t* data, int width) {
  uint32_t code = 0;
  for (int byte = 0; byte < width; ++byte) code |= static_cast<uint32_t>(data[byte]) << (8 * byte);
  return code;
}

// A swap does what a check and a write do, and what it wrote can be put back, however far it came.
void swap_once(const cpu::PatchIndex& index, Exact<uint8_t>& values, int64_t count, int unit, Exact<uint8_t>& target,
               const cpu::PatchChecked& seen) {
  Exact<uint8_t> swapped(target.count), written(target.count), old = noise<uint8_t>(count * unit);
  std::copy(target.data.get(), target.data.get() + target.count, swapped.data.get());
  std::copy(target.data.get(), target.data.get() + target.count, written.data.get());
  const cpu::PatchChecked done =
      cpu::patch_swap(index, values.data.get(), count, unit, swapped.data.get(), old.data.get());
  const cpu::PatchChecked other = cpu::patch_write(index, values.data.get(), count, unit, written.data.get());
  if (done.fault != seen.fault || done.at != seen.at || done.done != seen.done || other.done != seen.done ||
      done.sum.low != seen.sum.low || done.sum.high != seen.sum.high) {
    wrong("patch", "a check and a swap that do not agree");
  }
  if (!std::equal(swapped.data.get(), swapped.data.get() + target.count, written.data.get())) {
    wrong("patch", "a write and a swap that do not agree");
  }
  if (done.fault == cpu::PatchFault::kNone && done.done != count) wrong("patch", "a swap that ended early");
  Exact<uint8_t> back(done.done * unit);
  std::copy(old.data.get(), old.data.get() + back.count, back.data.get());
  cpu::patch_write(index, back.data.get(), done.done, unit, swapped.data.get());
  if (!std::equal(swapped.data.get(), swapped.data.get() + target.count, target.data.get())) {
    wrong("patch", "a swap that cannot be put back");
  }
}

void patch_once() {
  const int unit = 1 << between(0, 3), width = static_cast<int>(between(0, 3));
  const int bytes = width == 3 ? 4 : width;
  const int64_t units = between(0, between(0, 9) ? 60 : 3000);
  Exact<uint8_t> target = noise<uint8_t>(units * unit), before(units * unit);
  std::copy(target.data.get(), target.data.get() + target.count, before.data.get());
  // Honest half of the time: made by the encoder.
  if (between(0, 1)) {
    Exact<uint8_t> after(units * unit);
    for (int64_t i = 0; i < after.count; ++i) {
      after[i] = between(0, 9) ? target[i] : static_cast<uint8_t>(random_bits());
    }
    const cpu::PatchSizes sizes = cpu::patch_measure(target.data.get(), after.data.get(), target.count, unit);
    const int64_t room = width == 0 ? (units + 7) / 8 : bytes * sizes.codes[width - 1];
    const bool short_of = width != 0 && room > 0 && between(0, 9) == 0;  // somebody wrote in between
    Exact<uint8_t> index(room - short_of), values(sizes.count * unit);
    cpu::PatchSum replaced;
    const bool made = cpu::patch_encode(target.data.get(), after.data.get(), target.count, unit, bytes,
                                        index.data.get(), index.count, values.data.get(), values.count, &replaced);
    if (made == short_of) wrong("patch", "room that does not fit was taken, or the right room refused");
    if (!made) return;
    const cpu::PatchIndex given = {index.data.get(), index.count, bytes, units};
    const cpu::PatchChecked seen = cpu::patch_check(given, values.data.get(), sizes.count, unit, target.data.get());
    if (seen.fault != cpu::PatchFault::kNone) wrong("patch", "an honest patch was refused");
    if (seen.sum.low != replaced.low || seen.sum.high != replaced.high) wrong("patch", "another sum");
    if (cpu::patch_prove(given, sizes.count).fault != cpu::PatchFault::kNone) wrong("patch", "an honest index refused");
    swap_once(given, values, sizes.count, unit, target, seen);
    cpu::patch_write(given, values.data.get(), sizes.count, unit, target.data.get());
    if (!std::equal(target.data.get(), target.data.get() + target.count, after.data.get())) {
      wrong("patch", "another state than was diffed");
    }
    return;
  }
  const int64_t most = between(0, 3) ? 40 : 700;  // at times several batches
  const int64_t codes = between(0, most);
  Exact<uint8_t> index = noise<uint8_t>(width == 0 ? (units + 7) / 8 : codes * bytes);
  if (between(0, 1)) {  // small gaps, which may be right
    for (int64_t i = 0; i < index.count; ++i) index[i] = bytes > 1 && i % bytes ? 0 : index[i] % 4;
  }
  int64_t found = 0, at = -1;
  bool sound = true;
  if (width == 0) {
    for (int64_t i = 0; i < 8 * index.count; ++i) {
      const bool there = bit_of(index.data.get(), i);
      found += there;
      sound = sound && !(there && i >= units);
    }
  }
  const int64_t count = width == 0 && between(0, 3) ? found : between(0, 1) ? between(0, most) : codes;
  Exact<uint8_t> values = noise<uint8_t>(count * unit);
  const cpu::PatchIndex given = {index.data.get(), index.count, bytes, units};
  const cpu::PatchChecked seen = cpu::patch_check(given, values.data.get(), count, unit, target.data.get());
  if (!std::equal(target.data.get(), target.data.get() + target.count, before.data.get())) {
    wrong("patch", "a check that writes");
  }
  const cpu::PatchChecked proven = cpu::patch_prove(given, count);
  if (proven.fault != seen.fault || proven.at != seen.at) wrong("patch", "a check and a proof that do not agree");
  swap_once(given, values, count, unit, target, seen);
  if (seen.fault == cpu::PatchFault::kNone) {
    if (width == 0 && (!sound || found != count)) wrong("patch", "a bitmap that does not fit was taken");
    for (int64_t i = 0; width != 0 && i < index.count; i += bytes) {
      const int64_t code = read_code(index.data.get() + i, bytes), last = (INT64_C(1) << (8 * bytes)) - 1;
      at += code;
      if (at >= units && code != last) wrong("patch", "an index out of range was taken");
    }
  }
  const cpu::PatchChecked written = cpu::patch_write(given, values.data.get(), count, unit, target.data.get());
  if ((written.fault == cpu::PatchFault::kNone) != (seen.fault == cpu::PatchFault::kNone)) {
    wrong("patch", "a check and a write that do not agree");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string kernel = argv[1];
  const int64_t count = std::atoll(argv[2]);
  const uint64_t seed = std::strtoull(argv[3], nullptr, 10);
  const std::vector<cpu::Set> sets = cpu::sets();
  double slowest = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    random_bits.seed(seed + static_cast<uint64_t>(i));  // any one of them can be run again alone
    cpu::chosen = sets[static_cast<size_t>(i) % sets.size()];
    const std::clock_t started = std::clock();  // of this process: what else runs here does not count
    if (kernel == "bitmask") unpack_once(Codec::kBitmask, "bitmask");
    if (kernel == "int8") unpack_once(Codec::kInt8, "int8");
    if (kernel == "int4") unpack_once(Codec::kInt4, "int4");
    if (kernel == "sign") unpack_once(Codec::kSign, "sign");
    if (kernel == "encode") encode_once();
    if (kernel == "few_rows") few_rows_once();
    if (kernel == "patch") patch_once();
    slowest = std::max(slowest, static_cast<double>(std::clock() - started) / CLOCKS_PER_SEC);
  }
  std::printf("%s: %lld inputs from seed %llu under %zu instruction sets, 0 failed, the slowest %.1f ms\n",
              kernel.c_str(), static_cast<long long>(count), static_cast<unsigned long long>(seed), sets.size(),
              1e3 * slowest);
  return 0;
}
