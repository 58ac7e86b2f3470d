// The device primitives that the tile kernels are written in, and nothing else: shared memory,
// barriers, shuffles, cp.async, ldmatrix, mma. Compiled by nvcc they are the PTX instructions; compiled
// by a host compiler (tests/kernels/host) they are the twin of the same names, which runs the kernels' code on
// the CPU and finds their races. A kernel that includes only this header runs on both.
//
// Every primitive that touches shared memory or synchronises takes the caller's line as a default
// argument, for the twin's findings; on the device it is unused and costs nothing.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__)

#include "twin.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/types.h"

#define TAPS_DEVICE __device__ __forceinline__
#define TAPS_LINE int = 0

namespace taps::dev {

// A pointer into shared memory.
template <class T>
using sh = T*;

TAPS_DEVICE unsigned tid() { return threadIdx.x; }
TAPS_DEVICE unsigned lane() { return threadIdx.x & 31; }
TAPS_DEVICE unsigned warp() { return threadIdx.x >> 5; }
TAPS_DEVICE unsigned nthreads() { return blockDim.x; }
TAPS_DEVICE unsigned bid_x() { return blockIdx.x; }
TAPS_DEVICE unsigned bid_y() { return blockIdx.y; }
TAPS_DEVICE unsigned nblocks_x() { return gridDim.x; }

// The block's shared memory, 128-byte aligned; the launch gives its size.
TAPS_DEVICE sh<unsigned char> arena() {
  extern __shared__ __align__(128) unsigned char taps_shared[];
  return taps_shared;
}
template <class T>
TAPS_DEVICE sh<T> as(sh<unsigned char> base, unsigned bytes) {
  return reinterpret_cast<T*>(base + bytes);
}

// --- numbers: round to nearest even

TAPS_DEVICE float to_f32(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
TAPS_DEVICE float to_f32(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
TAPS_DEVICE float to_f32(float x) { return x; }
template <class T>
TAPS_DEVICE T from_f32(float x);
template <>
TAPS_DEVICE bf16 from_f32<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
TAPS_DEVICE f16 from_f32<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
TAPS_DEVICE float from_f32<float>(float x) {
  return x;
}
// Two numbers in a word, the first in its lower half.
template <class T>
TAPS_DEVICE uint32_t pack(float low, float high);
template <>
TAPS_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(both.x) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
}
template <>
TAPS_DEVICE uint32_t pack<f16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return __half_as_ushort(__low2half(both)) | static_cast<uint32_t>(__half_as_ushort(__high2half(both))) << 16;
}
// The sums of two pairs, each rounded once. It is the fp32 sum rounded, too: rounding twice is harmless where the wider
// type has 2 p + 2 bits (Figueroa 1995), and fp32's 24 are that for p = 11 and for p = 8.
template <class T>
TAPS_DEVICE uint32_t add2(uint32_t x, uint32_t y);
template <>
TAPS_DEVICE uint32_t add2<bf16>(uint32_t x, uint32_t y) {
  uint32_t sum;
#if __CUDA_ARCH__ >= 900
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(x), "r"(0x3f803f80u), "r"(y));  // by 1
#endif
  return sum;
}
template <>
TAPS_DEVICE uint32_t add2<f16>(uint32_t x, uint32_t y) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
  return sum;
}
TAPS_DEVICE unsigned popcount(uint32_t bits) { return static_cast<unsigned>(__popc(bits)); }
TAPS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
TAPS_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }
// A double of its two words, the lower half first.
TAPS_DEVICE double double_of(uint32_t low, uint32_t high) {
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}
TAPS_DEVICE uint32_t low_of(double x) { return static_cast<uint32_t>(__double2loint(x)); }
TAPS_DEVICE uint32_t high_of(double x) { return static_cast<uint32_t>(__double2hiint(x)); }
// fp32 rounded to tf32 (10 bits of mantissa, ties away from zero, as cvt.rna does).
TAPS_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// --- memory

template <class T>
TAPS_DEVICE T ld(sh<T> p, unsigned i, TAPS_LINE) {
  return p[i];
}
// Elements i and i + 1, for an even i.
template <class T>
TAPS_DEVICE Two<T> ld2(sh<T> p, unsigned i, TAPS_LINE) {
  return *reinterpret_cast<const Two<T>*>(p + i);
}
template <class T>
TAPS_DEVICE void st(sh<T> p, unsigned i, T value, TAPS_LINE) {
  p[i] = value;
}
template <class T>
TAPS_DEVICE Vec16 ld16(sh<T> p, unsigned i, TAPS_LINE) {
  return *reinterpret_cast<const Vec16*>(p + i);
}
template <class T>
TAPS_DEVICE void st16(sh<T> p, unsigned i, Vec16 value, TAPS_LINE) {
  *reinterpret_cast<Vec16*>(p + i) = value;
}
// Global memory, 16-byte aligned. What is read once leaves the caches first.
TAPS_DEVICE Vec16 gld16_once(const void* p) {
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
TAPS_DEVICE Vec16 gld16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// In assembly, because nvcc takes a store of four words apart where it stands in a larger kernel.
TAPS_DEVICE void gst16(void* p, Vec16 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(value.word[0]),
               "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

// 16 or 4 bytes (both sides aligned to that) from global to shared memory, of which the first `bytes` are read and
// the rest are zero. They land when the thread has waited for their group; others see them after a barrier.
template <int kBytes, class T>
TAPS_DEVICE void cp_async(sh<T> p, unsigned i, const void* source, unsigned bytes, TAPS_LINE) {
  static_assert(kBytes == 16 || kBytes == 4, "cp.async: the sizes in use");
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(p + i));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
  }
}
TAPS_DEVICE void cp_commit(TAPS_LINE) { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are in flight.
template <int N>
TAPS_DEVICE void cp_wait(TAPS_LINE) {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- synchronisation

TAPS_DEVICE void block_sync(TAPS_LINE) { __syncthreads(); }
TAPS_DEVICE void warp_sync(TAPS_LINE) { __syncwarp(); }
// Barriers 1 to 15, for `threads` threads (a multiple of 32).
TAPS_DEVICE void bar_sync(int barrier, int threads, TAPS_LINE) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
TAPS_DEVICE void bar_arrive(int barrier, int threads, TAPS_LINE) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- clusters: blocks of compute capability 9.0 and later that run together and read each other's shared memory. A
// block that was launched without one is a cluster of its own.

#if __CUDA_ARCH__ >= 900
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;  // what follows is not to be called
#endif
constexpr unsigned kMostOfCluster = 8;  // blocks, where a whole device of any kind is there; a slice may have fewer

// Ends the launch, as an error.
TAPS_DEVICE void trap(TAPS_LINE) { __trap(); }

// This block's number in its cluster.
TAPS_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
TAPS_DEVICE unsigned cluster_blocks() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return blocks;
}
// Of all threads of all blocks: what each wrote before is there for all, and no block has ended before.
TAPS_DEVICE void cluster_sync(TAPS_LINE) {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// 16 bytes, aligned to that, at the same place of the shared memory of the cluster's block `rank`.
template <class T>
TAPS_DEVICE Vec16 ld16_of(unsigned rank, sh<T> p, unsigned i, TAPS_LINE) {
  Vec16 value{};
#if __CUDA_ARCH__ >= 900
  const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(p + i));
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "r"(there)
               : "memory");
#endif
  return value;
}

// --- warps: all 32 lanes take part

template <class T>
TAPS_DEVICE T shfl(T value, int from, TAPS_LINE) {
  return __shfl_sync(0xffffffffu, value, from);
}
template <class T>
TAPS_DEVICE T shfl_xor(T value, int mask, TAPS_LINE) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
TAPS_DEVICE T shfl_down(T value, int by, TAPS_LINE) {
  return __shfl_down_sync(0xffffffffu, value, by);
}
TAPS_DEVICE uint32_t ballot(bool value, TAPS_LINE) { return __ballot_sync(0xffffffffu, value); }

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 and gets, of
// each matrix, elements (l / 4, 2 (l % 4)) and the next one; transposed, (2 (l % 4), l / 4) and the one below.
template <class T>
TAPS_DEVICE void ldsm_x4(uint32_t (&r)[4], sh<T> p, unsigned i, TAPS_LINE) {
  const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(p + i));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(source)
               : "memory");
}
template <class T>
TAPS_DEVICE void ldsm_x4_t(uint32_t (&r)[4], sh<T> p, unsigned i, TAPS_LINE) {
  const unsigned source = static_cast<unsigned>(__cvta_generic_to_shared(p + i));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(source)
               : "memory");
}

// C += A B with A [16, 16] (rows), B [16, 8] (columns), C [16, 8] in fp32. With g = lane / 4 and t = lane % 4:
// a0 is (g, 2t) and (g, 2t + 1), a1 eight rows below, a2 eight columns on, a3 both; b0 is (2t, g) and
// (2t + 1, g), b1 eight rows below; c0, c1 are (g, 2t) and (g, 2t + 1), c2, c3 eight rows below.
// With floats (tf32 operands, to_tf32) half the depth: A [16, 8], B [8, 8]. a0 is (g, t), a1 eight rows below, a2
// four columns on, a3 both; b0 is (t, g), b1 four rows below.
#define TAPS_MMA(type, instruction)                                                                \
  template <>                                                                                      \
  TAPS_DEVICE void mma<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int) { \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));              \
  }
template <class T>
TAPS_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TAPS_LINE);
TAPS_MMA(bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
TAPS_MMA(f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
TAPS_MMA(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef TAPS_MMA

}  // namespace taps::dev

#endif
