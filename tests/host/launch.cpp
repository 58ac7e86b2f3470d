// The launches of csrc/cuda/linear.cu on the twin, for a build of the extension whose operators run the tile kernels on
// the CPU (TAPS_TWIN). A finding is an error.
#include <stdexcept>

#include "cuda/linear.cuh"

namespace taps::cuda {
namespace {

using dev::bf16;
using dev::f16;

constexpr int kMultiprocessors = 8;

void run(const dev::Grid& grid, unsigned threads, unsigned shared, const std::function<void()>& body) {
  const auto found = twin::launch({grid.tiles, grid.splits, 1}, threads, shared, body);
  if (found.empty()) return;
  throw std::runtime_error(found[0].kind + " at " + found[0].file + ":" + std::to_string(found[0].line) + ": " +
                           found[0].text);
}

template <class T>
void launch_compute(Product kind, const LinearProduct& args, const dev::Grid& grid) {
  dev::with_instance<T>(kind, args, [&](auto instance) {
    using Body = typename decltype(instance)::type;
    run(grid, Body::Tile::kThreads, Body::Loop::kShared, [&] { Body::run(args); });
  });
  if (grid.splits == 1) return;
  const int64_t columns = kind == Product::kForward ? args.outputs : args.inputs;
  dev::Grid flat;
  flat.tiles = static_cast<unsigned>((args.rows * columns + 255) / 256);
  run(flat, 256, 0, [&] { dev::add_splits<T>(args, args.rows, columns); });
}

}  // namespace

int64_t linear_bytes(Product kind, const LinearProduct& args, int) {
  return dev::plan(kind, args, kMultiprocessors).bytes;
}

void linear(Product kind, LinearProduct args, int, void*) {
  const dev::Grid grid = dev::plan(kind, args, kMultiprocessors);
  args.splits = static_cast<int>(grid.splits);
  args.depth_of_split = grid.depth_of_split;
  if (args.compute == Dtype::kBFloat16) {
    launch_compute<bf16>(kind, args, grid);
  } else {
    launch_compute<f16>(kind, args, grid);
  }
  if (kind != Product::kWeightGradient || !args.score_gradient) return;
  double sum = 0.0;
  for (unsigned i = 0; i < grid.tiles; ++i) sum += static_cast<const double*>(args.memory)[i];
  sum *= args.scale;
  if (args.score_dtype == Dtype::kFloat64) {
    *static_cast<double*>(args.score_gradient) = sum;
  } else {
    *static_cast<float*>(args.score_gradient) = static_cast<float>(sum);
  }
}

}  // namespace taps::cuda
