// The launches of csrc/cuda/*.cu on the twin, for a build of the extension whose operators run the device's kernels on
// the CPU (TAPS_TWIN). A finding is an error.
#include <stdexcept>

#include "core/choose.h"
#include "cuda/conv2d.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/dot.cuh"
#include "cuda/linear.cuh"
#include "cuda/mixed.cuh"
#include "cuda/reconstruct.cuh"
#include "cuda/settle.cuh"
#include "cuda/unpack.cuh"

namespace taps::cuda {
namespace {

using dev::bf16;
using dev::f16;
using dev::kDotShared;
using dev::kThreads;

constexpr int kMultiprocessors = 8, kMostOfCluster = dev::kMostOfCluster;

void run(twin::Dim grid, unsigned threads, unsigned shared, const std::function<void()>& body, twin::Dim cluster = {}) {
  const auto found = twin::launch(grid, threads, shared, body, 0, cluster);
  if (found.empty()) return;
  throw std::runtime_error(found[0].kind + " at " + found[0].file + ":" + std::to_string(found[0].line) + ": " +
                           found[0].text);
}

template <class Body, class Args>
void launch(const Args& args, const dev::Grid& grid) {
  const twin::Dim blocks{grid.tiles, grid.splits};
  if constexpr (dev::kHasCluster<Body>) {
    if (grid.clustered) {
      run(blocks, Body::Tile::kThreads, Body::Loop::kShared, [&] { Body::run_in_cluster(args); }, {1, grid.splits});
      return;
    }
  }
  run(blocks, Body::Tile::kThreads, Body::Loop::kShared, [&] { Body::run(args); });
}

void sum_splits(const LinearProduct& args, int64_t rows, int64_t columns) {
  const auto blocks = static_cast<unsigned>((rows * columns + kThreads - 1) / kThreads);
  run({blocks}, kThreads, 0, [&] {
    if (args.compute == Dtype::kBFloat16) {
      dev::add_splits<bf16>(args, rows, columns);
    } else {
      dev::add_splits<f16>(args, rows, columns);
    }
  });
}

template <class T>
void launch_compute(Product kind, const LinearProduct& args, const dev::Grid& grid) {
  dev::with_instance<T>(kind, args, grid.kind,
                        [&](auto instance) { launch<typename decltype(instance)::type>(args, grid); });
  if (grid.splits > 1 && !grid.clustered)
    sum_splits(args, args.rows, kind == Product::kForward ? args.outputs : args.inputs);
}

template <class T>
void launch_convolution(const Convolution& args, const dev::Grid& grid) {
  dev::with_convolution<T>(args, [&](auto instance) { launch<typename decltype(instance)::type>(args, grid); });
  if (grid.splits > 1) sum_splits(args, args.rows, args.outputs);
}

void add_up(const double* values, int64_t count, double scale, void* result, Dtype dtype) {
  run({1}, kThreads, kDotShared, [&] { dev::dot_finish(values, count, scale, result, dtype); });
}

template <class T>
void launch_reconstruct(const Reconstruct& args) {
  run({dev::reconstruct_blocks(args, kMultiprocessors)}, kThreads, 0, [&] {
    if (args.walk.flat()) {
      dev::reconstruct_flat<T>(args, dev::takes_vectors(args));
    } else {
      dev::reconstruct_strided<T>(args);
    }
  });
}

}  // namespace

void reconstruct(const Reconstruct& args, int, void*) {
  if (args.walk.numel == 0) return;
  if (args.in_double()) {
    launch_reconstruct<double>(args);
  } else {
    launch_reconstruct<float>(args);
  }
}

void foreach_reconstruct(ForeachReconstruct args, int, void*) {
  const unsigned blocks = dev::plan_foreach(args);
  if (blocks == 0) return;
  const bool in_double = args.items[0].in_double();
  run({blocks}, kThreads, 0, [&] {
    if (in_double) {
      dev::foreach_reconstruct<double>(args);
    } else {
      dev::foreach_reconstruct<float>(args);
    }
  });
}

void foreach_settle(ForeachSettle args, int, void*) {
  const unsigned blocks = dev::plan_foreach(args);
  if (args.count == 0) return;
  const bool in_double = args.items[0].in_double();
  if (blocks > 0) {
    run({blocks}, kThreads, kDotShared, [&] {
      if (in_double) {
        dev::foreach_settle<double>(args);
      } else {
        dev::foreach_settle<float>(args);
      }
    });
  }
  if (!args.scores()) return;
  run({static_cast<unsigned>(args.count)}, kThreads, kDotShared, [&] { dev::foreach_finish(args); });
}

void unpack(const Unpack& args, int, void*) {
  if (args.delta.numel() == 0) return;
  const bool vectors = dev::takes_vectors(args), in_double = args.in_double();
  if (args.delta.codec != Codec::kBitmask) {
    run({dev::unpack_blocks(args, kMultiprocessors)}, kThreads, 0, [&] {
      if (in_double) {
        dev::unpack_codes<double>(args, vectors);
      } else {
        dev::unpack_codes<float>(args, vectors);
      }
    });
    return;
  }
  const auto chunks = static_cast<unsigned>(args.chunks());
  if (chunks > 1) run({chunks - 1}, kThreads, dev::kCountShared, [&] { dev::count_bitmask(args); });
  run({chunks}, kThreads, dev::kBitmaskShared, [&] {
    if (in_double) {
      dev::unpack_bitmask<double>(args, vectors);
    } else {
      dev::unpack_bitmask<float>(args, vectors);
    }
  });
}

void dot(const Dot& args, int, void*) {
  const int64_t chunks = dot_chunks(args.walk);
  const bool in_double = args.a_dtype == Dtype::kFloat64 || args.b_dtype == Dtype::kFloat64;
  const bool vectors = dev::aligned(args.a) && dev::aligned(args.b);
  if (chunks > 0) {
    run({static_cast<unsigned>(chunks)}, kThreads, kDotShared, [&] {
      if (!args.walk.flat()) {
        dev::dot_strided(args, (args.walk.numel + chunks - 1) / chunks);
      } else if (in_double) {
        dev::dot_flat<double>(args, vectors);
      } else {
        dev::dot_flat<float>(args, vectors);
      }
    });
  }
  add_up(args.partials, chunks, args.scale, args.result, args.result_dtype);
}

LinearPlan plan_linear(Product kind, const LinearProduct& args, int) {
  const int chosen = chosen_adding(kMostOfCluster) == Adding::kCluster ? kMostOfCluster : 0;
  return {dev::plan(kind, args, {kMultiprocessors, chosen}).bytes, chosen};
}

void linear(Product kind, LinearProduct args, const LinearPlan& planned, int, void*) {
  const dev::Grid grid = dev::plan(kind, args, {kMultiprocessors, planned.most_of_cluster});
  dev::set_grid(args, grid);
  if (args.compute == Dtype::kBFloat16) {
    launch_compute<bf16>(kind, args, grid);
  } else {
    launch_compute<f16>(kind, args, grid);
  }
  if (kind == Product::kWeightGradient && args.score_gradient) {
    add_up(static_cast<const double*>(args.memory), grid.tiles, args.scale, args.score_gradient, args.score_dtype);
  }
}

int64_t mixed_bytes(const MixedBatch& args) {
  MixedBatch sized = args;
  sized.product.memory = nullptr;
  return dev::mixed_parts(sized);
}

void mixed_order(MixedBatch& args, int, void*) {
  dev::mixed_parts(args);
  run({1}, kThreads, dev::kOrderShared, [&] { dev::order_samples(args); });
}

void mixed(Product product, const MixedBatch& args, int, void*) {
  const dev::Grid grid = product == Product::kWeightGradient ? dev::mixed_grid<dev::WeightTile>(product, args)
                                                             : dev::mixed_grid<dev::MoreRows>(product, args);
  if (grid.tiles == 0 || grid.splits == 0) return;
  const auto launch_one = [&](auto instance) { launch<typename decltype(instance)::type>(args, grid); };
  if (args.product.compute == Dtype::kBFloat16) {
    dev::with_mixed<bf16>(product, args.product, launch_one);
  } else {
    dev::with_mixed<f16>(product, args.product, launch_one);
  }
  if (product != Product::kWeightGradient || !args.partials) return;
  run({static_cast<unsigned>(args.count)}, kThreads, kDotShared,
      [&] { dev::mixed_scores(args, static_cast<int64_t>(grid.tiles)); });
}

void spoil(const Spoil& args, int, void*) {
  run({static_cast<unsigned>(args.samples)}, kThreads, 0, [&] { dev::spoil_sample(args); });
}

int64_t conv2d_bytes(const Convolution& args, int) {
  return dev::plan(Product::kForward, args, {kMultiprocessors}).bytes;
}

void conv2d(Convolution args, int, void*) {
  const dev::Grid grid = dev::plan(Product::kForward, args, {kMultiprocessors});
  dev::set_grid(args, grid);
  if (args.compute == Dtype::kBFloat16) {
    launch_convolution<bf16>(args, grid);
  } else {
    launch_convolution<f16>(args, grid);
  }
}

int64_t depthwise_bytes(Product product, const Depthwise& args, int) {
  return dev::plan(product, args, kMultiprocessors).bytes;
}

void depthwise(Product product, Depthwise args, int, void*) {
  const dev::DepthwiseGrid grid = dev::plan(product, args, kMultiprocessors);
  dev::set_grid(args, grid);
  const auto launch = [&](auto instance) {
    using Body = typename decltype(instance)::type;
    run({grid.groups, grid.splits}, kThreads, Body::kShared, [&] { Body::run(args); });
  };
  if (args.compute == Dtype::kBFloat16) {
    dev::with_depthwise<bf16>(product, args, launch);
  } else if (args.compute == Dtype::kFloat16) {
    dev::with_depthwise<f16>(product, args, launch);
  } else {
    dev::with_depthwise<float>(product, args, launch);
  }
  if (product != Product::kWeightGradient) return;
  const auto blocks = static_cast<unsigned>(dev::settling_blocks(args));
  run({blocks}, kThreads, dev::kSettleShared, [&] { dev::settle_depthwise(args); });
  if (args.score_gradient) {
    add_up(static_cast<const double*>(args.memory), blocks, args.scale, args.score_gradient, args.score_dtype);
  }
}

}  // namespace taps::cuda
