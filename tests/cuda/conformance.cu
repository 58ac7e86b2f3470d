// The first program to run on a GPU: the conformance checks that the twin passes on the CPU, then the three products of
// the tile loop on shapes off its grid, in numbers whose sums are exact. Prints what failed; the exit code is the
// number of failures.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cuda/conformance.cuh"
#include "cuda/linear.cuh"

using namespace taps::dev;  // NOLINT
using namespace taps;       // NOLINT

namespace {

__global__ void conform(const float* source, unsigned* good) { conformance(source, good); }
template <class Body>
__global__ void __launch_bounds__(Body::Tile::kThreads) product(LinearProduct args) {
  Body::run(args);
}
template <class T>
__global__ void sum_of_splits(LinearProduct args, int64_t rows, int64_t columns) {
  add_splits<T>(args, rows, columns);
}

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

template <class T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? Dtype::kFloat32 : std::is_same_v<T, bf16> ? Dtype::kBFloat16 : Dtype::kFloat16;
}

// Whole numbers from -8 to 8: every product and sum below is exact in fp32, so the device must agree to the last bit
// before the one rounding to T.
template <class T>
void fill(T* data, int64_t count, unsigned salt) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>((i * 2654435761u + salt) / 7 % 17) - 8.0f;
    if constexpr (sizeof(T) == 4) {
      data[i] = value;
    } else if constexpr (std::is_same_v<T, bf16>) {
      uint32_t bits;
      memcpy(&bits, &value, 4);
      data[i].bits = static_cast<uint16_t>(bits >> 16);
    } else {
      data[i].bits = __half_as_ushort(__float2half_rn(value));
    }
  }
}
template <class T>
double number(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
  } else {
    return __half2float(__ushort_as_half(x.bits));
  }
}

template <class Body>
void launch(const LinearProduct& args, int64_t rows, int64_t columns) {
  using S = typename Body::Tile;
  constexpr int kShared = static_cast<int>(Body::Loop::kShared);
  must(cudaFuncSetAttribute(product<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "shared memory");
  const auto tiles = static_cast<unsigned>((rows + S::kRows - 1) / S::kRows * ((columns + S::kColumns - 1) / S::kColumns));
  product<Body><<<dim3(tiles, static_cast<unsigned>(args.splits)), S::kThreads, kShared>>>(args);
  must(cudaGetLastError(), "launch");
}

// One product with W of T and Delta of D against whole numbers; T is float for tf32.
template <class T, class D>
bool agrees(Product kind, int64_t m, int64_t n, int64_t k, bool open, bool read, int splits) {
  T *x = shared_memory<T>(m * k), *dy = shared_memory<T>(m * n), *w = shared_memory<T>(n * k);
  D *d = shared_memory<D>(n * k), *ddelta = shared_memory<D>(n * k);
  T *out = shared_memory<T>(m * (n > k ? n : k));
  float* score = shared_memory<float>(1);
  const int64_t bytes = 4 * splits * m * (n > k ? n : k) + 8 * ((n + 63) / 64) * ((k + 63) / 64);
  double* memory = shared_memory<double>(bytes / 8 + 1);
  fill(x, m * k, 1), fill(dy, m * n, 2), fill(w, n * k, 3), fill(d, n * k, 4);
  *score = open ? 0.2f : 0.05f;
  LinearProduct args;
  args.rows = m, args.outputs = n, args.inputs = k;
  args.x = {x, k}, args.dy = {dy, n}, args.weight = {w, k}, args.delta = {d, k};
  args.gate.open = open, args.gate.threshold = 0.1, args.gate.score = read ? score : nullptr;
  args.memory = memory, args.splits = splits, args.score_gradient = memory;
  const bool forward = kind == Product::kForward, weight = kind == Product::kWeightGradient;
  const int64_t depth = forward ? k : weight ? m : n, rows = weight ? n : m, columns = forward ? n : k;
  args.depth_of_split = (depth + 64 * splits - 1) / (64 * splits) * 64;
  args.result = weight ? static_cast<void*>(ddelta) : out, args.ld_result = columns;
  if (weight) {
    launch<WeightGradient<WeightTile, T, D>>(args, rows, columns);
  } else {
    if (!forward) {
      launch<InputGradient<MoreRows, T, T, D>>(args, rows, columns);
    } else if (m <= kFewRows) {
      launch<Forward<FewRows, T, T, D>>(args, rows, columns);
    } else {
      launch<Forward<MoreRows, T, T, D>>(args, rows, columns);
    }
    if (splits > 1) sum_of_splits<T><<<static_cast<unsigned>((rows * columns + 255) / 256), 256>>>(args, rows, columns);
  }
  must(cudaDeviceSynchronize(), "product");
  bool good = true;
  double dot = 0.0, got_dot = 0.0;
  for (int64_t r = 0; r < rows && good; ++r) {
    for (int64_t c = 0; c < columns && good; ++c) {
      double want = 0.0;
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t at = forward ? c * k + i : i * k + c;
        const double used = weight ? number(x[i * k + c]) : number(w[at]) + (open ? number(d[at]) : 0.0);
        want += number(forward ? x[r * k + i] : weight ? dy[i * n + r] : dy[r * n + i]) * used;
      }
      if (weight) dot += want * number(d[r * k + c]);
      if (weight && !open) want = 0.0;
      const double got = weight ? number(ddelta[r * k + c]) : number(out[r * columns + c]);
      const double ulp = weight ? (sizeof(D) == 4 ? 0.0 : 0x1p-8) : (sizeof(T) == 4 ? 0.0 : 0x1p-8);
      good = std::fabs(got - want) <= ulp * std::fabs(want);
      if (!good) std::printf("at (%lld, %lld): expected %g, got %g\n", (long long)r, (long long)c, want, got);
    }
  }
  for (int64_t i = 0; weight && i < (n + 63) / 64 * ((k + 63) / 64); ++i) got_dot += memory[i];
  good = good && got_dot == dot;  // whole numbers below 2^53
  for (void* p : {(void*)x, (void*)dy, (void*)w, (void*)d, (void*)ddelta, (void*)out, (void*)score, (void*)memory}) {
    must(cudaFree(p), "free");
  }
  return good;
}

template <class T, class D>
int failures_of(const char* name) {
  int failures = 0;
  for (const int64_t m : {1, 17, 130}) {
    for (const int64_t n : {1, 65, 257}) {
      for (const int64_t k : {1, 72, 257}) {
        for (const Product kind : {Product::kForward, Product::kInputGradient, Product::kWeightGradient}) {
          for (int variant = 0; variant < 6; ++variant) {
            const int splits = kind == Product::kWeightGradient || variant < 3 ? 1 : 3;
            if (agrees<T, D>(kind, m, n, k, variant % 3 != 0, variant % 3 == 2 || variant == 0, splits)) continue;
            std::printf("%s: product %d of %lld x %lld x %lld, variant %d failed\n", name, static_cast<int>(kind), (long long)m,
                        (long long)n, (long long)k, variant);
            ++failures;
          }
        }
      }
    }
  }
  return failures;
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
  failures += failures_of<bf16, float>("bf16, Delta fp32");
  failures += failures_of<f16, f16>("f16");
  failures += failures_of<float, float>("tf32");
  std::printf("%d failures\n", failures);
  return failures > 90 ? 90 : failures;
}
