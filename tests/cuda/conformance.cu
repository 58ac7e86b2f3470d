// The first program to run on a GPU: the conformance checks that the twin passes on the CPU, then the tile loop on
// shapes off its grid, against float64. Prints what failed; the exit code is the number of failures.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/conformance.cuh"
#include "cuda/tile.cuh"

using namespace taps::dev;  // NOLINT

namespace {

using Tile = LinearTile<bf16, float, 64, 64, 2, 2, 3>;
using Args = LinearArgs<bf16, float>;

__global__ void conform(const float* source, unsigned* good) { conformance(source, good); }
__global__ void __launch_bounds__(Tile::kThreads) linear(Args args) { Tile::run(args); }
__global__ void reduce(Args args) { Tile::reduce(args); }

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(99);
}

template <class E>
E* shared_memory(size_t count) {
  E* p = nullptr;
  must(cudaMallocManaged(&p, (count + 1) * sizeof(E)), "allocation");
  return p;
}

bf16 rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
float next() { return static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f; }

bool linear_agrees(int64_t m, int64_t n, int64_t k, Gate gate, float score, int splits) {
  bf16 *x = shared_memory<bf16>(m * k), *w = shared_memory<bf16>(n * k), *y = shared_memory<bf16>(m * n);
  float *d = shared_memory<float>(n * k), *s = shared_memory<float>(1), *partial = shared_memory<float>(splits * m * n);
  for (int64_t i = 0; i < m * k; ++i) x[i] = rounded(next());
  for (int64_t i = 0; i < n * k; ++i) w[i] = rounded(next()), d[i] = next();
  *s = score;
  Args args{};
  args.x = x, args.weight = w, args.delta = d, args.y = y, args.partial = partial, args.score = s;
  args.threshold = 0.1f, args.gate = gate, args.m = m, args.n = n, args.k = k;
  args.ldx = args.ldw = args.ldd = k, args.ldy = n, args.splits = splits;
  args.k_per_split = (k + splits * Tile::kDepth - 1) / (splits * Tile::kDepth) * Tile::kDepth;
  const dim3 grid(static_cast<unsigned>((n + 63) / 64), static_cast<unsigned>((m + 63) / 64), static_cast<unsigned>(splits));
  must(cudaFuncSetAttribute(linear, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared), "shared memory");
  linear<<<grid, Tile::kThreads, Tile::kShared>>>(args);
  must(cudaGetLastError(), "launch");
  if (splits > 1) reduce<<<static_cast<unsigned>((m * n + 255) / 256), 256>>>(args);
  must(cudaDeviceSynchronize(), "linear");
  const bool open = gate == Gate::kOpen || (gate == Gate::kRead && score >= 0.1f);
  bool good = true;
  for (int64_t r = 0; r < m && good; ++r) {
    for (int64_t c = 0; c < n && good; ++c) {
      double want = 0.0, size = 0.0;
      for (int64_t i = 0; i < k; ++i) {
        const float used = open ? widened(rounded(widened(w[c * k + i]) + d[c * k + i])) : widened(w[c * k + i]);
        want += static_cast<double>(widened(x[r * k + i])) * used;
        size += std::fabs(static_cast<double>(widened(x[r * k + i])) * used);
      }
      // k + splits additions in fp32, which tensor cores may truncate (2^-23 each), then one rounding to bf16.
      const double bound = static_cast<double>(k + splits) * 0x1p-23 * size + 0x1p-8 * std::fabs(want) + 1e-7;
      good = std::fabs(widened(y[r * n + c]) - want) <= bound;
      if (!good) std::printf("at (%lld, %lld): expected %g, got %g\n", (long long)r, (long long)c, want, widened(y[r * n + c]));
    }
  }
  for (void* p : {(void*)x, (void*)w, (void*)y, (void*)d, (void*)s, (void*)partial}) must(cudaFree(p), "free");
  return good;
}

}  // namespace

int main() {
  int failures = 0;
  float* source = shared_memory<float>(256);
  unsigned* good = shared_memory<unsigned>(kConformanceChecks);
  for (int i = 0; i < 256; ++i) source[i] = static_cast<float>(i);
  conform<<<1, 64, kConformanceShared>>>(source, good);
  must(cudaGetLastError(), "launch");
  must(cudaDeviceSynchronize(), "conformance");
  for (unsigned i = 0; i < kConformanceChecks; ++i) {
    if (!good[i]) std::printf("conformance check %u failed\n", i), ++failures;
  }
  const int64_t sizes[] = {1, 17, 65, 257};
  for (const int64_t m : sizes) {
    for (const int64_t n : sizes) {
      for (const int64_t k : sizes) {
        for (const int splits : {1, 3}) {
          for (const Gate gate : {Gate::kClosed, Gate::kOpen, Gate::kRead}) {
            if (linear_agrees(m, n, k, gate, m % 2 ? 0.2f : 0.05f, splits)) continue;
            std::printf("linear %lld x %lld x %lld gate %d splits %d failed\n", (long long)m, (long long)n, (long long)k,
                        static_cast<int>(gate), splits);
            ++failures;
          }
        }
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures > 90 ? 90 : failures;
}
