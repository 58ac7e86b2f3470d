// The host twin of csrc/cuda/primitives.cuh: the same names, run on the CPU by fibers, one a thread of the
// block. Shared memory is an arena that only `ld`, `st` and the other primitives reach; every access is checked
// against what happened before it (vector clocks), so a race is found whatever order the fibers ran in.
//
// What it finds, each with the line of the primitive's caller: data races in shared memory, reads of memory never
// written, reads of asynchronous copies that were not waited for, exit with copies in flight, barriers that never
// complete, lanes of a warp in different collectives, misaligned and out-of-range accesses, and in clusters reads of a
// block that may have ended. What it cannot: races in global memory, operand constraints of inline assembly, rounding
// inside mma, speed.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/types.h"

#define TAPS_DEVICE inline
#define TAPS_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace twin {

struct Where {
  const char* file;
  int line;
};

struct Finding {
  std::string kind;  // "race", "uninitialised", "pending copy", "deadlock", ...
  std::string text;
  const char* file;
  int line;
};

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Runs `body` once for every thread of every block; returns what was found, one finding for each kind and line.
// `seed` 0 runs the threads in order, any other in an order drawn from it at every switch. A block that cannot go on
// is given up, and so is its cluster: as many blocks each way as `cluster` says, which run together.
std::vector<Finding> launch(Dim grid, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body,
                            uint64_t seed = 0, Dim cluster = {});

// --- what the primitives below are made of; valid inside a launch

void report(const char* kind, const std::string& text, Where where);
unsigned thread();
unsigned threads();
Dim block();
Dim grid();
unsigned rank();    // of the block in its cluster
unsigned blocks();  // of the cluster
void read(uint32_t at, void* out, uint32_t bytes, Where where);
void read_of(unsigned rank, uint32_t at, void* out, uint32_t bytes, Where where);
void write(uint32_t at, const void* in, uint32_t bytes, Where where);
void copy_async(uint32_t at, const void* source, uint32_t size, uint32_t bytes, Where where);
void copy_commit(Where where);
void copy_wait(unsigned in_flight, Where where);
void barrier(int id, unsigned threads, bool waits, Where where);
void warp_barrier(Where where);
void cluster_barrier(Where where);
// Every lane of the warp gives `bytes`; returns those of all 32, in order, until the lane's next exchange.
const unsigned char* exchange(const char* what, const void* mine, uint32_t bytes, Where where);

template <class T>
T one_of(const unsigned char* all, unsigned lane) {
  T value;
  std::memcpy(&value, all + lane * sizeof(T), sizeof(T));
  return value;
}

}  // namespace twin

namespace taps::dev {

template <class T>
struct sh {
  uint32_t at = 0;  // bytes into the arena
  sh operator+(unsigned i) const { return {at + i * static_cast<uint32_t>(sizeof(T))}; }
};

inline unsigned tid() { return twin::thread(); }
inline unsigned lane() { return twin::thread() & 31; }
inline unsigned warp() { return twin::thread() >> 5; }
inline unsigned nthreads() { return twin::threads(); }
inline unsigned bid_x() { return twin::block().x; }
inline unsigned bid_y() { return twin::block().y; }
inline unsigned nblocks_x() { return twin::grid().x; }
inline sh<unsigned char> arena() { return {}; }
template <class T>
sh<T> as(sh<unsigned char> base, unsigned bytes) {
  return {base.at + bytes};
}

// --- numbers

inline unsigned popcount(uint32_t bits) { return static_cast<unsigned>(__builtin_popcount(bits)); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double double_of(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline uint32_t low_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return static_cast<uint32_t>(bits);
}
inline uint32_t high_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return static_cast<uint32_t>(bits >> 32);
}
float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);

inline float to_f32(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_f32(f16 x) { return half_to_float(x.bits); }
inline float to_f32(float x) { return x; }
template <class T>
T from_f32(float x);
template <>
inline bf16 from_f32<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the device's NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline f16 from_f32<f16>(float x) {
  return {float_to_half(x)};
}
template <>
inline float from_f32<float>(float x) {
  return x;
}
template <class T>
uint32_t pack(float low, float high) {
  return from_f32<T>(low).bits | static_cast<uint32_t>(from_f32<T>(high).bits) << 16;
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// The device rounds once, which is the same: see primitives.cuh.
template <class T>
uint32_t add2(uint32_t x, uint32_t y) {
  const auto half = [](uint32_t both, int shift) { return to_f32(T{static_cast<uint16_t>(both >> shift)}); };
  return pack<T>(half(x, 0) + half(y, 0), half(x, 16) + half(y, 16));
}

// --- memory

template <class T>
T ld(sh<T> p, unsigned i, TAPS_LINE) {
  T value;
  twin::read((p + i).at, &value, sizeof(T), {file, line});
  return value;
}
template <class T>
Two<T> ld2(sh<T> p, unsigned i, TAPS_LINE) {
  Two<T> value;
  twin::read((p + i).at, &value, sizeof(value), {file, line});
  return value;
}
template <class T>
void st(sh<T> p, unsigned i, T value, TAPS_LINE) {
  twin::write((p + i).at, &value, sizeof(T), {file, line});
}
template <class T>
Vec16 ld16(sh<T> p, unsigned i, TAPS_LINE) {
  Vec16 value;
  twin::read((p + i).at, &value, 16, {file, line});
  return value;
}
template <class T>
void st16(sh<T> p, unsigned i, Vec16 value, TAPS_LINE) {
  twin::write((p + i).at, &value, 16, {file, line});
}
Vec16 gld16_once(const void* p, TAPS_LINE);
inline Vec16 gld16(const void* p, TAPS_LINE) { return gld16_once(p, file, line); }
void gst16(void* p, Vec16 value, TAPS_LINE);
template <int kBytes, class T>
void cp_async(sh<T> p, unsigned i, const void* source, unsigned bytes, TAPS_LINE) {
  twin::copy_async((p + i).at, source, kBytes, bytes, {file, line});
}
inline void cp_commit(TAPS_LINE) { twin::copy_commit({file, line}); }
template <int N>
void cp_wait(TAPS_LINE) {
  twin::copy_wait(N, {file, line});
}

// --- synchronisation

inline void block_sync(TAPS_LINE) { twin::barrier(0, twin::threads(), true, {file, line}); }
inline void warp_sync(TAPS_LINE) { twin::warp_barrier({file, line}); }
inline void bar_sync(int id, int threads, TAPS_LINE) {
  twin::barrier(id, static_cast<unsigned>(threads), true, {file, line});
}
inline void bar_arrive(int id, int threads, TAPS_LINE) {
  twin::barrier(id, static_cast<unsigned>(threads), false, {file, line});
}

// --- clusters

constexpr bool kClusters = true;
constexpr unsigned kMostOfCluster = 8;
inline void trap(TAPS_LINE) { twin::report("trap", "the launch is ended", {file, line}); }
inline unsigned cluster_rank() { return twin::rank(); }
inline unsigned cluster_blocks() { return twin::blocks(); }
inline void cluster_sync(TAPS_LINE) { twin::cluster_barrier({file, line}); }
template <class T>
Vec16 ld16_of(unsigned rank, sh<T> p, unsigned i, TAPS_LINE) {
  Vec16 value;
  twin::read_of(rank, (p + i).at, &value, 16, {file, line});
  return value;
}

// --- warps

template <class T>
T shfl(T value, int from, TAPS_LINE) {
  return twin::one_of<T>(twin::exchange("shfl", &value, sizeof(T), {file, line}), static_cast<unsigned>(from) & 31);
}
template <class T>
T shfl_xor(T value, int mask, TAPS_LINE) {
  const unsigned from = lane() ^ static_cast<unsigned>(mask);
  return twin::one_of<T>(twin::exchange("shfl_xor", &value, sizeof(T), {file, line}), from & 31);
}
template <class T>
T shfl_down(T value, int by, TAPS_LINE) {
  const unsigned from = lane() + static_cast<unsigned>(by);
  return twin::one_of<T>(twin::exchange("shfl_down", &value, sizeof(T), {file, line}), from < 32 ? from : lane());
}
inline uint32_t ballot(bool value, TAPS_LINE) {
  const unsigned char* all = twin::exchange("ballot", &value, 1, {file, line});
  uint32_t bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all[i] != 0) << i;
  return bits;
}

void load_matrices(uint32_t (&r)[4], uint32_t at, bool transposed, twin::Where where);
template <class T>
void ldsm_x4(uint32_t (&r)[4], sh<T> p, unsigned i, TAPS_LINE) {
  load_matrices(r, (p + i).at, false, {file, line});
}
template <class T>
void ldsm_x4_t(uint32_t (&r)[4], sh<T> p, unsigned i, TAPS_LINE) {
  load_matrices(r, (p + i).at, true, {file, line});
}

enum class Operand { kBFloat16, kFloat16, kTf32 };
void multiply(Operand kind, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], twin::Where where);
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TAPS_LINE) {
  const Operand sixteen = std::is_same_v<T, bf16> ? Operand::kBFloat16 : Operand::kFloat16;
  multiply(sizeof(T) == 4 ? Operand::kTf32 : sixteen, c, a, b, {file, line});
}

}  // namespace taps::dev
