// One reading of the PTX manual, for both compilers: what the primitives must do, lane by lane, against plain loops
// that know nothing of fragments. The twin runs it on the CPU; on a GPU it runs first, before any kernel is trusted.
// `good` holds ones; whichever thread finds a check failed writes 0. One block of 64 threads, `kConformanceShared`
// bytes.
#pragma once

#include "cuda/primitives.cuh"

namespace taps::dev {

constexpr unsigned kConformanceShared = 4096;
enum Conformance : unsigned {
  kShuffles,
  kBallot,
  kLdmatrix,
  kLdmatrixTransposed,
  kMmaBFloat16,
  kMmaFloat16,
  kMmaTf32,
  kCopies,
  kCopiesShort,
  kCopiesOfWords,
  kPairs,
  kNamedBarrier,
  kRounding,
  kSums,
  kWords,
  kConformanceChecks
};

// Small whole numbers, exact in every type here, different in every place.
TAPS_DEVICE float sample(unsigned row, unsigned column) {
  return static_cast<float>((row * 7 + column * 3) % 17) - 8.0f;
}

TAPS_DEVICE bool all_lanes(bool good) { return ballot(good) == 0xffffffffu; }

TAPS_DEVICE bool check_shuffles() {
  const int me = static_cast<int>(lane());
  bool good = shfl(me * 3, 5) == 15 && shfl_xor(me, 9) == (me ^ 9);
  good = shfl_down(me, 4) == (me + 4 < 32 ? me + 4 : me) && good;
  return all_lanes(good);
}

TAPS_DEVICE bool check_ldmatrix(bool transposed) {
  // Four matrices of 8 rows of 8: element (m, i, j) holds 64 m + 8 i + j.
  const sh<uint16_t> tile = as<uint16_t>(arena(), warp() * 1024);
  for (unsigned i = 0; i < 8; ++i) st(tile, lane() * 8 + i, static_cast<uint16_t>(lane() * 8 + i));
  warp_sync();
  uint32_t r[4];
  if (transposed) {
    ldsm_x4_t(r, tile, lane() * 8);
  } else {
    ldsm_x4(r, tile, lane() * 8);
  }
  const unsigned group = lane() / 4, pair = 2 * (lane() % 4);
  bool good = true;
  for (unsigned m = 0; m < 4; ++m) {
    const unsigned low = transposed ? 8 * pair + group : 8 * group + pair;
    const unsigned high = low + (transposed ? 8 : 1);
    good = good && r[m] == ((64 * m + low) | ((64 * m + high) << 16));
  }
  warp_sync();
  return all_lanes(good);
}

template <class T>
TAPS_DEVICE uint32_t two(float low, float high) {
  return from_f32<T>(low).bits | (static_cast<uint32_t>(from_f32<T>(high).bits) << 16);
}

template <class T>
TAPS_DEVICE bool check_mma() {
  const unsigned g = lane() / 4, t = lane() % 4;
  uint32_t a[4], b[2];
  float c[4];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
    a[i] = two<T>(sample(row, k), sample(row, k + 1));
    c[i] = static_cast<float>(100 * (g + 8 * (i / 2)) + 2 * t + i % 2);
  }
  for (unsigned i = 0; i < 2; ++i) {
    const unsigned k = 2 * t + 8 * i;
    b[i] = two<T>(sample(k + 40, g), sample(k + 41, g));
  }
  mma<T>(c, a, b);
  bool good = true;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float want = static_cast<float>(100 * row + column);
    for (unsigned k = 0; k < 16; ++k) want += sample(row, k) * sample(k + 40, column);
    good = good && c[i] == want;
  }
  return all_lanes(good);
}

TAPS_DEVICE bool check_mma_tf32() {
  const unsigned g = lane() / 4, t = lane() % 4;
  uint32_t a[4], b[2];
  float c[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  for (unsigned i = 0; i < 4; ++i) a[i] = to_tf32(sample(g + 8 * (i % 2), t + 4 * (i / 2)));
  for (unsigned i = 0; i < 2; ++i) b[i] = to_tf32(sample(t + 4 * i + 40, g));
  mma<float>(c, a, b);
  bool good = true;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    float want = static_cast<float>(i + 1);
    for (unsigned k = 0; k < 8; ++k) want += sample(row, k) * sample(k + 40, column);
    good = good && c[i] == want;
  }
  return all_lanes(good);
}

// `source` holds at least 4 * 64 floats, 16-byte aligned: 0, 1, 2, ...
TAPS_DEVICE bool check_copies(const float* source, unsigned bytes) {
  const sh<float> floats = as<float>(arena(), 0);
  cp_async<16>(floats, 4 * tid(), source + 4 * tid(), bytes);
  cp_commit();
  cp_wait<0>();
  block_sync();
  const unsigned other = (tid() + 32) % nthreads();
  bool good = true;
  for (unsigned i = 0; i < 4; ++i) {
    good = good && ld(floats, 4 * other + i) == (4 * i < bytes ? static_cast<float>(4 * other + i) : 0.0f);
  }
  block_sync();
  return all_lanes(good);
}

// Copies that end inside a word: 2, 6 and 14 bytes of 16, and 2 of 4.
TAPS_DEVICE bool check_parts(const float* source) {
  const sh<uint16_t> halves = as<uint16_t>(arena(), 0);
  const uint16_t* const from = reinterpret_cast<const uint16_t*>(source) + 8 * tid();
  bool good = true;
  for (unsigned bytes = 2; bytes <= 14; bytes += 4) {
    cp_async<16>(halves, 8 * tid(), from, bytes);
    cp_commit();
    cp_wait<0>();
    for (unsigned i = 0; i < 8; ++i) good = good && ld(halves, 8 * tid() + i) == (2 * i < bytes ? from[i] : 0);
  }
  cp_async<4>(halves, 8 * tid(), from + 2, 2);
  cp_commit();
  cp_wait<0>();
  good = good && ld(halves, 8 * tid()) == from[2] && ld(halves, 8 * tid() + 1) == 0;
  block_sync();
  return all_lanes(good);
}

TAPS_DEVICE bool check_copies_of_words(const float* source) {
  const sh<float> floats = as<float>(arena(), 0);
  cp_async<4>(floats, tid(), source + tid() + 1, tid() % 2 == 0 ? 4 : 0);
  cp_commit();
  cp_wait<0>();
  block_sync();
  const unsigned other = (tid() + 33) % nthreads();
  const bool good = ld(floats, other) == (other % 2 == 0 ? static_cast<float>(other + 1) : 0.0f);
  block_sync();
  return all_lanes(good);
}

// Neighbours read together, and packed into a word.
TAPS_DEVICE bool check_pairs() {
  const sh<bf16> tile = as<bf16>(arena(), 0);
  const float low = sample(tid(), 1) + 0.001f, high = sample(tid(), 2) - 0.001f;
  st(tile, 2 * tid(), from_f32<bf16>(low));
  st(tile, 2 * tid() + 1, from_f32<bf16>(high));
  const Two<bf16> both = ld2(tile, 2 * tid());
  bool good = (both.x.bits | static_cast<uint32_t>(both.y.bits) << 16) == pack<bf16>(low, high);
  good = good && pack<f16>(low, high) == two<f16>(low, high);
  block_sync();
  return all_lanes(good);
}

TAPS_DEVICE bool check_named_barrier() {
  const sh<uint32_t> words = as<uint32_t>(arena(), 2048);
  bool good = true;
  if (warp() == 0) {
    st(words, lane(), lane() + 7);
    bar_arrive(1, 64);
  } else {
    bar_sync(1, 64);
    good = ld(words, lane()) == lane() + 7;
  }
  block_sync();
  return all_lanes(good);
}

TAPS_DEVICE bool check_rounding() {
  // Ties to even, both ways, overflow, the least subnormal half, and tf32's ties away from zero.
  bool good =
      from_f32<bf16>(float_of(0x3f808000u)).bits == 0x3f80 && from_f32<bf16>(float_of(0x3f818000u)).bits == 0x3f82;
  good = good && from_f32<bf16>(float_of(0x3f808001u)).bits == 0x3f81 &&
         from_f32<bf16>(float_of(0x7f7fffffu)).bits == 0x7f80;
  good = good && from_f32<f16>(float_of(0x3f801000u)).bits == 0x3c00 &&
         from_f32<f16>(float_of(0x3f803000u)).bits == 0x3c02;
  good = good && from_f32<f16>(65519.0f).bits == 0x7bff && from_f32<f16>(65520.0f).bits == 0x7c00;
  good = good && from_f32<f16>(float_of(0x33000001u)).bits == 1 && from_f32<f16>(float_of(0x33000000u)).bits == 0;
  good = good && to_f32(f16{0x0001}) == float_of(0x33800000u) && to_f32(f16{0xfbff}) == -65504.0f;
  // The 13 bits below are the tensor core's to ignore.
  good = good && (to_tf32(float_of(0x3f801000u)) & ~0x1fffu) == 0x3f802000u;
  good = good && (to_tf32(float_of(0x3f800fffu)) & ~0x1fffu) == 0x3f800000u;
  return good;
}

// Pairs added at once: the bits of the fp32 sum rounded, whatever the signs and the exponents (NaN aside).
template <class T>
TAPS_DEVICE bool check_sums() {
  bool good = true;
  for (uint32_t i = 0; i < 512; ++i) {
    const uint32_t at = i * nthreads() + tid();
    const uint32_t x = at * 2654435761u, y = (at ^ 0x9e3779b9u) * 2246822519u;
    const auto half = [](uint32_t both, int shift) { return to_f32(T{static_cast<uint16_t>(both >> shift)}); };
    const float low = half(x, 0) + half(y, 0), high = half(x, 16) + half(y, 16);
    if (low != low || high != high) continue;
    good = good && add2<T>(x, y) == pack<T>(low, high);
  }
  return all_lanes(good);
}

// 16 bytes of global memory, doubles in words, bits counted, and the grid, of one block.
TAPS_DEVICE bool check_words(const float* source) {
  const Vec16 v = gld16_once(source + 4 * tid());
  bool good = nblocks_x() == 1;
  for (unsigned i = 0; i < 4; ++i) good = good && float_of(v.word[i]) == static_cast<float>(4 * tid() + i);
  good = good && popcount(0) == 0 && popcount(0x80000001u) == 2 && popcount(0xffffffffu) == 32;
  const double x = 1.5 + 0x1p-40;
  good = good && low_of(x) == 0x1000u && high_of(x) == 0x3ff80000u && double_of(low_of(x), high_of(x)) == x;
  return all_lanes(good);
}

TAPS_DEVICE void conformance(const float* source, unsigned* good) {
  const bool results[kConformanceChecks] = {check_shuffles(),
                                            ballot(lane() % 3 == 0) == 0x49249249u,
                                            check_ldmatrix(false),
                                            check_ldmatrix(true),
                                            check_mma<bf16>(),
                                            check_mma<f16>(),
                                            check_mma_tf32(),
                                            (block_sync(), check_copies(source, 16)),
                                            (check_copies(source, 8) & check_parts(source)) != 0,
                                            check_copies_of_words(source),
                                            check_pairs(),
                                            check_named_barrier(),
                                            check_rounding(),
                                            check_sums<bf16>() && check_sums<f16>(),
                                            check_words(source)};
  for (unsigned i = 0; i < kConformanceChecks; ++i) {
    if (!results[i]) good[i] = 0;
  }
}

}  // namespace taps::dev
