// The forward of a gated linear layer on the CPU: x as floats, kFewRows of them at a time, the outputs shared by the
// threads. W_t is built anew for each block of rows.
#include <cstring>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace taps::cpu {
namespace {

int64_t padded(int64_t depth) { return (depth + kFewRowsPadding - 1) / kFewRowsPadding * kFewRowsPadding; }

}  // namespace

// fp32 rows of whole vectors are read where they are.
int64_t linear_bytes(const LinearProduct& args) {
  if (args.compute == Dtype::kFloat32 && padded(args.inputs) == args.inputs) return 0;
  return (args.rows < kFewRows ? args.rows : kFewRows) * padded(args.inputs) * 4;
}

namespace {

void block_of_rows(const LinearProduct& args) {
  const float* x = static_cast<const float*>(args.x.data);
  int64_t ld = args.x.ld;
  if (linear_bytes(args) > 0) {
    float* const copy = static_cast<float*>(args.memory);
    ld = padded(args.inputs);
    for (int64_t row = 0; row < args.rows; ++row) {
      const char* const from = static_cast<const char*>(args.x.data) + row * args.x.ld * size_of(args.compute);
      lanes().reconstruct(copy + row * ld, Dtype::kFloat32, 1, {from, args.compute, 1}, {nullptr, args.compute, 1}, 1.0,
                          false, args.inputs);
      std::memset(copy + row * ld + args.inputs, 0, static_cast<size_t>(ld - args.inputs) * 4);
    }
    x = copy;
  }
  const FewRows run = few_rows();
  constexpr int64_t kTogether = kFewRowsOutputs;
  const int64_t grain = args.inputs * kTogether >= kGrain ? 1 : kGrain / (args.inputs * kTogether);
  parallel_for((args.outputs + kTogether - 1) / kTogether, grain, [&](int64_t begin, int64_t end) {
    run(args, x, ld, begin * kTogether, end * kTogether < args.outputs ? end * kTogether : args.outputs);
  });
}

}  // namespace

void linear(const LinearProduct& args) {
  for (int64_t row = 0; row < args.rows; row += kFewRows) {
    LinearProduct block = args;
    block.rows = args.rows - row < kFewRows ? args.rows - row : kFewRows;
    block.x.data = static_cast<const char*>(args.x.data) + row * args.x.ld * size_of(args.compute);
    block.result = static_cast<char*>(args.result) + row * args.ld_result * size_of(args.compute);
    block_of_rows(block);
  }
}

}  // namespace taps::cpu
