// The first program to run on a GPU: the conformance checks that the twin passes on the CPU, then the three products of
// the tile loop and convolutions on shapes off its grid, in numbers whose sums are exact, and what adds splits in
// numbers whose sums are not. Prints what failed; the exit code is the number of failures. With an argument only what
// the twin has time for (tests/kernels/host/device_program.cpp): whether a kernel that stores nothing is seen, and the
// splits.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/conformance.cuh"
#include "cuda/conv2d.cuh"
#include "cuda/linear.cuh"
#include "cuda/mixed.cuh"

using namespace taps::dev;  // NOLINT
using namespace taps;       // NOLINT

namespace {

__global__ void conform(const float* source, unsigned* good) { conformance(source, good); }
template <class Body, class Args>
__global__ void __launch_bounds__(Body::Tile::kThreads) product(Args args) {
  Body::run(args);
}
template <class Body>
__global__ void __launch_bounds__(Body::Tile::kThreads) clustered_product(LinearProduct args) {
  if constexpr (kClusters) {
    Body::run_in_cluster(args);
  } else {
    trap();
  }
}
template <class Body>
__global__ void __launch_bounds__(Body::Tile::kThreads) mixed_product(const __grid_constant__ MixedBatch args) {
  Body::run(args);
}
__global__ void ordered(const __grid_constant__ MixedBatch args) { order_samples(args); }
template <class T>
__global__ void sum_of_splits(LinearProduct args, int64_t rows, int64_t columns) {
  add_splits<T>(args, rows, columns);
}

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(99);
}

// A vector with a copy of exactly its size on the device, so that memcheck sees every step beyond it.
template <class E>
struct Both {
  std::vector<E> host;
  E* device = nullptr;
  explicit Both(int64_t count) : host(static_cast<size_t>(count)) { must(cudaMalloc(&device, bytes()), "allocation"); }
  ~Both() { cudaFree(device); }
  Both(const Both&) = delete;
  size_t bytes() const { return host.size() * sizeof(E); }
  // What nobody has stored is no number, or with another byte no number that is expected: not the launch's before.
  void blank(int byte = 0xff) { must(cudaMemset(device, byte, bytes()), "fill"); }
  void up() { must(cudaMemcpy(device, host.data(), bytes(), cudaMemcpyHostToDevice), "copy"); }
  void down() { must(cudaMemcpy(host.data(), device, bytes(), cudaMemcpyDeviceToHost), "copy"); }
};

template <class T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? Dtype::kFloat32 : std::is_same_v<T, bf16> ? Dtype::kBFloat16 : Dtype::kFloat16;
}

// As the device rounds, on the host: to nearest, ties to even.
template <class T>
T rounded(double x) {
  if constexpr (sizeof(T) == 4) {
    return static_cast<float>(x);
  } else if constexpr (std::is_same_v<T, bf16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))};
  } else {
    return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
  }
}
template <class T>
double number(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return __bfloat162float(__ushort_as_bfloat16(x.bits));
  } else {
    return __half2float(__ushort_as_half(x.bits));
  }
}

// Whole numbers from -8 to 8: every product and sum below is exact in fp32, so that the device must agree to the bit.
template <class T>
void fill(Both<T>& both, unsigned salt) {
  for (size_t i = 0; i < both.host.size(); ++i) {
    both.host[i] = rounded<T>(static_cast<double>((i * 2654435761u + salt) / 7 % 17) - 8.0);
  }
  both.up();
}

// In the planted run no kernel runs, as if each stored nothing.
bool planted = false;
int in_clusters = 0;  // products so far

// `clusters`: all blocks in y are one.
template <class... Of>
void start(void (*kernel)(Of...), dim3 blocks, unsigned threads, unsigned shared, bool clusters, const Of&... args) {
  if (planted) return;
  must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
       "shared memory");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, blocks.y, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  config.attrs = &cluster, config.numAttrs = clusters ? 1 : 0;
  must(cudaLaunchKernelEx(&config, kernel, args...), "launch");
  in_clusters += clusters;
}

template <class S>
dim3 blocks_of(int64_t rows, int64_t columns, int splits) {
  const int64_t tiles = (rows + S::kRows - 1) / S::kRows * ((columns + S::kColumns - 1) / S::kColumns);
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
}

template <class Body, class Args>
void launch(const Args& args, int64_t rows, int64_t columns) {
  using S = typename Body::Tile;
  start(product<Body, Args>, blocks_of<S>(rows, columns, args.splits), S::kThreads, Body::Loop::kShared, false, args);
}

// The second kernel.
template <class T>
void add(const LinearProduct& args, int64_t rows, int64_t columns) {
  start(sum_of_splits<T>, dim3(static_cast<unsigned>((rows * columns + 255) / 256)), 256, 0, false, args, rows,
        columns);
}

bool has_clusters() {
  int major = 0;
  must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
  return major >= 9;
}

// Blocks of a product that a cluster may have on this device.
template <class Body>
int most_of_cluster() {
  constexpr unsigned kShared = Body::Loop::kShared;
  must(cudaFuncSetAttribute(clustered_product<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                            static_cast<int>(kShared)),
       "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, kMostOfCluster), config.blockDim = dim3(Body::Tile::kThreads);
  config.dynamicSmemBytes = kShared;
  int most = 0;
  must(cudaOccupancyMaxPotentialClusterSize(&most, clustered_product<Body>, &config), "blocks of a cluster");
  return most;
}

// A product in tiles: its splits added by clusters, where the device has them of so many blocks, or by the second
// kernel.
template <class T, class D>
void launch_tiles(Product kind, Tiles tiles, const LinearProduct& args, int64_t rows, int64_t columns, bool clusters) {
  with_activation<T, T, D>(kind, tiles, [&](auto instance) {
    using Body = typename decltype(instance)::type;
    using S = typename Body::Tile;
    if constexpr (kHasCluster<Body>) {
      if (clusters && args.splits <= most_of_cluster<Body>()) {
        start(clustered_product<Body>, blocks_of<S>(rows, columns, args.splits), S::kThreads, Body::Loop::kShared, true,
              args);
        return;
      }
      launch<Body>(args, rows, columns);
      if (args.splits > 1) add<T>(args, rows, columns);
    }
  });
}

// The forward of up to four rows without tensor cores (rows.cuh), with as many slices of the depth.
template <class T, class D>
void launch_rows(LinearProduct args, unsigned slices) {
  const Grid grid = plan_rows(args, slices);
  args.slices = static_cast<int>(grid.slices), args.depth_of_split = grid.depth_of_split;
  with_activation<T, T, D>(Product::kForward, grid.kind, [&](auto instance) {
    using Body = typename decltype(instance)::type;
    if constexpr (std::is_same_v<typename Body::Tile, Warps>)
      start(product<Body, LinearProduct>, dim3(grid.tiles), Body::Tile::kThreads, Body::Loop::kShared, false, args);
  });
}

// One product with W of T and Delta of D against whole numbers; T is float for tf32.
template <class T, class D>
bool agrees(Product kind, int64_t m, int64_t n, int64_t k, bool open, bool read, int splits, Tiles tiles,
            bool clusters) {
  const bool forward = kind == Product::kForward, weight = kind == Product::kWeightGradient;
  const int64_t depth = forward ? k : weight ? m : n, rows = weight ? n : m, columns = forward ? n : k;
  const int64_t blocks = (n + 63) / 64 * ((k + 63) / 64);
  Both<T> x(m * k), dy(m * n), w(n * k), out(weight ? 1 : rows * columns);
  Both<D> d(n * k), ddelta(n * k);
  Both<float> score(1);
  Both<double> memory(weight ? blocks : (splits * rows * columns + 1) / 2);
  fill(x, 1), fill(dy, 2), fill(w, 3), fill(d, 4);
  out.blank(), ddelta.blank(), memory.blank();
  score.host[0] = open ? 0.2f : 0.05f;
  score.up();
  LinearProduct args;
  args.rows = m, args.outputs = n, args.inputs = k;
  args.x = {x.device, k}, args.dy = {dy.device, n}, args.weight = {w.device, k}, args.delta = {d.device, k};
  args.gate.open = open, args.gate.threshold = 0.1, args.gate.score = read ? score.device : nullptr;
  args.memory = memory.device, args.splits = splits, args.score_gradient = memory.device;
  args.depth_of_split = (depth + 64 * splits - 1) / (64 * splits) * 64;
  args.result = weight ? static_cast<void*>(ddelta.device) : out.device, args.ld_result = columns;
  const bool without_tiles = forward && sizeof(T) == 2 && m <= Warps::kMostRows;
  if (weight) {
    launch<WeightGradient<WeightTile, T, D>>(args, rows, columns);
  } else if (without_tiles) {
    if constexpr (sizeof(T) == 2) launch_rows<T, D>(args, splits > 1 ? 4 : 1);
  } else {
    launch_tiles<T, D>(kind, tiles, args, rows, columns, clusters);
  }
  must(cudaDeviceSynchronize(), "product");
  out.down(), ddelta.down(), memory.down();
  bool good = true;
  double dot = 0.0, got_dot = 0.0;
  for (int64_t r = 0; r < rows && good; ++r) {
    for (int64_t c = 0; c < columns && good; ++c) {
      double want = 0.0;
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t at = forward ? c * k + i : i * k + c;
        const double used = weight ? number(x.host[i * k + c]) : number(w.host[at]) + (open ? number(d.host[at]) : 0.0);
        want += number(forward ? x.host[r * k + i] : weight ? dy.host[i * n + r] : dy.host[r * n + i]) * used;
      }
      if (weight) dot += want * number(d.host[r * k + c]);
      if (weight && !open) want = 0.0;
      const double got = weight ? number(ddelta.host[r * k + c]) : number(out.host[r * columns + c]);
      want = weight ? number(rounded<D>(want)) : number(rounded<T>(want));
      good = got == want;
      if (!good && !planted)
        std::printf("at (%lld, %lld): expected %g, got %g\n", (long long)r, (long long)c, want, got);
    }
  }
  for (int64_t i = 0; weight && i < blocks; ++i) got_dot += memory.host[i];
  return good && got_dot == dot;  // whole numbers below 2^53
}

template <class T, class D>
int failures_of(const char* name) {
  int failures = 0;
  for (const int64_t m : {1, 3, 9, 17, 130}) {
    for (const int64_t n : {1, 65, 257}) {
      for (const int64_t k : {1, 72, 257}) {
        for (const Product kind : {Product::kForward, Product::kInputGradient, Product::kWeightGradient}) {
          for (int variant = 0; variant < 6; ++variant) {
            const int splits = kind == Product::kWeightGradient || variant < 3 ? 1 : 3;
            for (const Tiles tiles : {Tiles::kFewRows, Tiles::kMoreRows, Tiles::kWide, Tiles::kWidest}) {
              const bool forward = kind == Product::kForward;
              if ((tiles == Tiles::kFewRows) != (m <= kFewRows) || (!forward && tiles > Tiles::kMoreRows)) continue;
              const bool splitting = splits > 1 && !(forward && m <= Warps::kMostRows && sizeof(T) == 2);
              bool good = true;
              for (const bool clusters : {false, true}) {
                if (clusters && !(splitting && has_clusters())) continue;
                good = good && agrees<T, D>(kind, m, n, k, variant % 3 != 0, variant % 3 == 2 || variant == 0, splits,
                                            tiles, clusters);
              }
              if (good) continue;
              std::printf("%s: product %d of %lld x %lld x %lld, variant %d, tiles %d failed\n", name,
                          static_cast<int>(kind), (long long)m, (long long)n, (long long)k, variant,
                          static_cast<int>(tiles));
              ++failures;
            }
          }
        }
      }
    }
  }
  return failures;
}

// A convolution of [images, side, side + 1, channels] with W of T and Delta of D against whole numbers.
template <class T, class D>
bool convolves(int64_t images, int64_t side, int64_t channels, int64_t outputs, int64_t kernel, int64_t step,
               int64_t padding, int64_t dilation, int splits) {
  Convolution args;
  args.outputs = outputs, args.channels = channels, args.inputs = kernel * kernel * channels, args.rows = images;
  for (int axis = 0; axis < 2; ++axis) {
    args.size[axis] = side + axis, args.kernel[axis] = kernel, args.stride[axis] = step;
    args.padding[axis] = padding, args.dilation[axis] = dilation;
    args.result_size[axis] = (args.size[axis] + 2 * padding - dilation * (kernel - 1) - 1) / step + 1;
    args.rows *= args.result_size[axis];
  }
  const int64_t height = args.size[0], width = args.size[1], lines = args.result_size[0], columns = args.result_size[1];
  Both<T> x(images * height * width * channels), w(outputs * args.inputs), out(args.rows * outputs);
  Both<D> d(outputs * args.inputs);
  Both<float> memory(splits * args.rows * outputs);
  fill(x, 1), fill(w, 3), fill(d, 4);
  out.blank(), memory.blank();
  args.x.data = x.device, args.x_strides[0] = height * width * channels, args.x_strides[1] = 1;
  args.x_strides[2] = width * channels, args.x_strides[3] = channels;
  args.weight = {w.device, args.inputs}, args.delta = {d.device, args.inputs}, args.gate.open = true;
  args.result = out.device, args.ld_result = outputs, args.memory = memory.device, args.splits = splits;
  args.depth_of_split = (args.inputs + 64 * splits - 1) / (64 * splits) * 64;
  if (args.rows <= kFewRows) {
    launch<Convolved<FewRows, T, T, D>>(args, args.rows, outputs);
  } else {
    launch<Convolved<MoreRows, T, T, D>>(args, args.rows, outputs);
  }
  if (splits > 1) add<T>(args, args.rows, outputs);
  must(cudaDeviceSynchronize(), "convolution");
  out.down();
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t n = row / (lines * columns), top = row / columns % lines * step - padding;
    const int64_t left = row % columns * step - padding;
    for (int64_t o = 0; o < outputs; ++o) {
      double want = 0.0;
      for (int64_t i = 0; i < args.inputs; ++i) {
        const int64_t h = top + i / channels / kernel * dilation, v = left + i / channels % kernel * dilation;
        if (h < 0 || h >= height || v < 0 || v >= width) continue;
        want += number(x.host[((n * height + h) * width + v) * channels + i % channels]) *
                (number(w.host[o * args.inputs + i]) + number(d.host[o * args.inputs + i]));
      }
      const double got = number(out.host[row * outputs + o]);
      if (got == number(rounded<T>(want))) continue;
      if (!planted) std::printf("at (%lld, %lld): expected %g, got %g\n", (long long)row, (long long)o, want, got);
      return false;
    }
  }
  return true;
}

template <class T, class D>
int failures_of_convolutions(const char* name) {
  // Images, side, channels, outputs, kernel, stride, padding, dilation.
  constexpr int64_t kCases[][8] = {{1, 4, 64, 65, 3, 1, 1, 1}, {3, 7, 40, 33, 3, 1, 1, 1}, {2, 9, 8, 70, 5, 2, 2, 1},
                                   {2, 6, 72, 9, 1, 2, 0, 1},  {1, 8, 24, 31, 3, 1, 3, 2}, {5, 2, 16, 64, 2, 1, 1, 3}};
  int failures = 0;
  for (const auto& [images, side, channels, outputs, kernel, step, padding, dilation] : kCases) {
    for (const int splits : {1, 3}) {
      if (convolves<T, D>(images, side, channels, outputs, kernel, step, padding, dilation, splits)) continue;
      std::printf("%s: convolution of %lld x %lld, %lld x %lld, %d splits failed\n", name, (long long)images,
                  (long long)channels, (long long)kernel, (long long)kernel, splits);
      ++failures;
    }
  }
  return failures;
}

// A mixed batch of two open tasks, one that the device finds closed, the base, and an id of no task.
template <class T, class D>
bool mixes(Product kind, int64_t samples, int64_t each, int64_t n, int64_t k) {
  constexpr int kTasks = 3;
  const bool forward = kind == Product::kForward, weight = kind == Product::kWeightGradient;
  const int64_t m = samples * each, depth = forward ? k : n, columns = forward ? n : k;
  Both<T> x(m * k), dy(m * n), w(n * k), out(m * columns);
  Both<D> d(kTasks * n * k), ddelta(kTasks * n * k);
  Both<float> score(1);
  Both<int64_t> ids(samples);
  fill(x, 1), fill(dy, 2), fill(w, 3), fill(d, 4);
  out.blank(0x7b), ddelta.blank();  // rows of no task become NaN
  for (int64_t i = 0; i < samples; ++i) ids.host[i] = i * 7 % 5 - 1;
  score.host[0] = 0.05f;
  score.up(), ids.up();
  MixedBatch args;
  LinearProduct& p = args.product;
  p.rows = m, p.outputs = n, p.inputs = k;
  p.x = {x.device, k}, p.dy = {dy.device, n}, p.weight = {w.device, k};
  p.result = out.device, p.ld_result = columns;
  args.ids = ids.device, args.samples = samples, args.each = each, args.all_tasks = args.count = kTasks;
  for (int task = 0; task < kTasks; ++task) {
    MixedTask& one = args.tasks[task];
    one.delta = {d.device + task * n * k, k};
    one.gate.open = true, one.gate.threshold = 0.1, one.gate.score = task == 1 ? score.device : nullptr;
    if (weight) one.delta_gradient = ddelta.device + task * n * k, one.ld_gradient = k;
  }
  Both<double> memory(mixed_parts(args) / 8);
  p.memory = memory.device;
  mixed_parts(args);
  start(ordered, dim3(1), kThreads, kOrderShared, false, args);
  const Grid grid = weight ? mixed_grid<WeightTile>(kind, args) : mixed_grid<MoreRows>(kind, args);
  const auto run = [&](auto instance) {
    using Body = typename decltype(instance)::type;
    start(mixed_product<Body>, dim3(grid.tiles, grid.splits), Body::Tile::kThreads, Body::Loop::kShared, false, args);
  };
  if (weight) {
    run(Instance<MixedWeightGradient<WeightTile, T, D>>());
  } else {
    with_mixed_types<T, T, D>(kind, run);
  }
  must(cudaDeviceSynchronize(), "mixed batch");
  out.down(), ddelta.down();
  const auto task_of = [&](int64_t row) { return ids.host[row / each]; };
  for (int64_t task = 0; weight && task < kTasks; ++task) {
    for (int64_t at = 0; at < n * k; ++at) {
      double want = 0.0;
      for (int64_t r = 0; r < m && task != 1; ++r) {
        if (task_of(r) == task) want += number(dy.host[r * n + at / k]) * number(x.host[r * k + at % k]);
      }
      if (number(ddelta.host[task * n * k + at]) != number(rounded<D>(want))) return false;
    }
  }
  for (int64_t at = 0; !weight && at < m * columns; ++at) {
    const int64_t r = at / columns, c = at % columns, task = task_of(r);
    double want = 0.0;
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t of = forward ? c * k + i : i * k + c;
      const bool open = task == 0 || task == 2;
      want += number(forward ? x.host[r * k + i] : dy.host[r * n + i]) *
              (number(w.host[of]) + (open ? number(d.host[task * n * k + of]) : 0.0));
    }
    const double got = number(out.host[at]);
    if (task >= kTasks ? !std::isnan(got) : got != number(rounded<T>(want))) return false;
  }
  return true;
}

template <class T, class D>
int failures_of_mixed(const char* name) {
  int failures = 0;
  for (const Product kind : {Product::kForward, Product::kInputGradient, Product::kWeightGradient}) {
    for (const int64_t samples : {1, 9, 70}) {
      for (const int64_t each : {1, 5}) {
        for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {65, 72}, {64, 257}}) {
          if (mixes<T, D>(kind, samples, each, n, k)) continue;
          std::printf("%s: mixed product %d of %lld x %lld rows, %lld x %lld failed\n", name, static_cast<int>(kind),
                      (long long)samples, (long long)each, (long long)n, (long long)k);
          ++failures;
        }
      }
    }
  }
  return failures;
}

// Each way to a result, and then with no kernel behind it: what the launch before left must not pass.
int failures_of_planted() {
  int failures = 0;
  const auto both = [&](const char* name, const auto& right) {
    for (const bool nothing : {false, true}) {
      planted = nothing;
      if (right() == !nothing) continue;
      std::printf("%s: %s\n", name, nothing ? "right without a kernel" : "wrong");
      ++failures;
    }
    planted = false;
  };
  for (const bool clusters : {false, true}) {
    if (clusters && !has_clusters()) continue;
    both("forward",
         [&] { return agrees<bf16, float>(Product::kForward, 9, 33, 72, true, true, 2, Tiles::kFewRows, clusters); });
    both("input gradient", [&] {
      return agrees<bf16, float>(Product::kInputGradient, 9, 72, 33, true, true, 2, Tiles::kMoreRows, clusters);
    });
  }
  both("few rows", [] { return agrees<f16, f16>(Product::kForward, 3, 9, 72, true, true, 1, Tiles::kFewRows, false); });
  both("weight gradient",
       [] { return agrees<f16, f16>(Product::kWeightGradient, 9, 33, 72, true, true, 1, Tiles::kMoreRows, false); });
  both("convolution", [] { return convolves<f16, f16>(1, 4, 8, 9, 3, 1, 1, 1, 3); });
  for (const Product kind : {Product::kForward, Product::kWeightGradient})
    both("mixed batch", [&] { return mixes<f16, f16>(kind, 9, 1, 33, 40); });
  return failures;
}

// Numbers whose sums show their order: from -1 to 1, in steps of 2^-23.
template <class T>
void scatter(Both<T>& both, uint32_t state) {
  for (T& one : both.host) {
    state = state * 1664525u + 1013904223u;
    one = rounded<T>(static_cast<double>(state >> 8) * 0x1p-23 - 1.0);
  }
  both.up();
}

// Whether clusters add splits to the bits of the second kernel, with a bias, in a result with columns between its rows.
template <class T, class D>
bool adds_alike(Product kind, int64_t m, int64_t n, int64_t k, int splits, Tiles tiles) {
  const bool forward = kind == Product::kForward;
  const int64_t columns = forward ? n : k, depth = forward ? k : n, ld = columns + 3;
  Both<T> x(m * k), dy(m * n), w(n * k), bias(n), second(m * ld), together(m * ld);
  Both<D> d(n * k);
  Both<float> memory(splits * m * columns);
  scatter(x, 1), scatter(dy, 2), scatter(w, 3), scatter(d, 4), scatter(bias, 5);
  LinearProduct args;
  args.rows = m, args.outputs = n, args.inputs = k, args.gate.open = true;
  args.x = {x.device, k}, args.dy = {dy.device, n}, args.weight = {w.device, k}, args.delta = {d.device, k};
  args.bias = forward ? bias.device : nullptr, args.ld_result = ld, args.splits = splits;
  args.depth_of_split = (depth + 64 * splits - 1) / (64 * splits) * 64;
  for (Both<T>* out : {&second, &together}) {
    out->blank(), memory.blank();
    args.result = out->device, args.memory = memory.device;
    const int before = in_clusters;
    launch_tiles<T, D>(kind, tiles, args, m, columns, out == &together);
    must(cudaDeviceSynchronize(), "splits");
    out->down(), memory.down();
    if (in_clusters == before) continue;  // a slice of a device may not have clusters of so many blocks
    for (const float one : memory.host) {
      if (!std::isnan(one)) return false;  // clusters need no memory
    }
  }
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < ld; ++c) {
      if (std::isnan(number(second.host[r * ld + c])) != (c >= columns)) return false;
    }
  }
  return std::memcmp(second.host.data(), together.host.data(), second.bytes()) == 0;
}

template <class T, class D>
int failures_of_adding(const char* name) {
  int failures = 0;
  const auto one = [&](Product kind, int64_t m, int64_t n, int64_t k, int splits, Tiles tiles) {
    if (adds_alike<T, D>(kind, m, n, k, splits, tiles)) return;
    std::printf("%s: %d splits of product %d in tiles %d are added otherwise in clusters\n", name, splits,
                static_cast<int>(kind), static_cast<int>(tiles));
    ++failures;
  };
  for (const int splits : {2, 3, 5, 8}) {
    one(Product::kForward, 9, 33, 505, splits, Tiles::kFewRows);
    one(Product::kForward, 33, 65, 505, splits, Tiles::kMoreRows);
    one(Product::kInputGradient, 33, 505, 65, splits, Tiles::kMoreRows);
    one(Product::kForward, 33, 129, 505, splits, Tiles::kWide);
    one(Product::kForward, 70, 129, 505, splits, Tiles::kWidest);
  }
  return failures;
}

}  // namespace

int main(int argc, char**) {
  int failures = failures_of_planted();
  if (has_clusters()) {
    failures += failures_of_adding<float, float>("tf32");
    failures += failures_of_adding<bf16, float>("bf16, Delta fp32");
  }
  if (argc > 1) {
    std::printf("%d products in clusters, %d failures\n", in_clusters, failures);
    return failures > 90 ? 90 : failures;
  }
  Both<float> source(256);
  Both<unsigned> good(kConformanceChecks);
  for (int i = 0; i < 256; ++i) source.host[i] = static_cast<float>(i);
  for (unsigned& one : good.host) one = 1;
  source.up(), good.up();
  start(conform, dim3(1), 64, kConformanceShared, false, static_cast<const float*>(source.device), good.device);
  must(cudaDeviceSynchronize(), "conformance");
  good.down();
  for (unsigned i = 0; i < kConformanceChecks; ++i) {
    if (!good.host[i]) std::printf("conformance check %u failed\n", i), ++failures;
  }
  failures += failures_of<bf16, float>("bf16, Delta fp32");
  failures += failures_of<f16, f16>("f16");
  failures += failures_of<float, float>("tf32");
  failures += failures_of_convolutions<bf16, bf16>("bf16");
  failures += failures_of_convolutions<f16, float>("f16, Delta fp32");
  failures += failures_of_mixed<bf16, float>("bf16, Delta fp32");
  failures += failures_of_mixed<f16, f16>("f16");
  std::printf("%d products in clusters, %d failures\n", in_clusters, failures);
  return failures > 90 ? 90 : failures;
}
