// The forward of a gated linear layer on the CPU, block of rows by block of rows: few rows as floats, more of them
// packed, the outputs shared by the threads. W_t is built anew for each block.
#include <cstring>

#include "cpu/packed.h"

namespace taps::cpu {
namespace {

constexpr int64_t kMeetingRows = 4;
constexpr int64_t kMeeting = 1024;  // floats: 4096 bytes, the sets of L1

// Between rows of a copy of x. A power of two would have rows meet in the same sets of L1.
int64_t padded(int64_t depth) {
  const int64_t whole = (depth + kFewRowsPadding - 1) / kFewRowsPadding * kFewRowsPadding;
  return whole % kMeeting == 0 ? whole + kFewRowsPadding : whole;
}

const char* row_of_x(const LinearProduct& args, int64_t row) {
  return static_cast<const char*>(args.x.data) + row * args.x.ld * size_of(args.compute);
}

}  // namespace

// Few fp32 rows of whole vectors are read where they are, unless more of them meet than L1 has room for.
int64_t linear_bytes(const LinearProduct& args) {
  if (args.rows > kFewRows) return packed_floats(args.rows, args.inputs) * 4;
  const bool whole = args.compute == Dtype::kFloat32 && args.inputs % kFewRowsPadding == 0;
  if (whole && (args.rows <= kMeetingRows || args.x.ld % kMeeting != 0)) return 0;
  return args.rows * padded(args.inputs) * 4;
}

namespace {

void few(const LinearProduct& args) {
  const float* x = static_cast<const float*>(args.x.data);
  int64_t ld = args.x.ld;
  if (linear_bytes(args) > 0) {
    float* const copy = static_cast<float*>(args.memory);
    ld = padded(args.inputs);
    for (int64_t row = 0; row < args.rows; ++row) {
      lanes().reconstruct(copy + row * ld, Dtype::kFloat32, 1, {row_of_x(args, row), args.compute, 1},
                          {nullptr, args.compute, 1}, 1.0, false, args.inputs);
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

template <class Element>
void many(const LinearProduct& args) {
  const Split blocks(args.rows, kTiledRows);
  for (int64_t block = 0; block < blocks.parts; ++block) {
    TileProduct product{args};
    const int64_t first = blocks.begin(block);
    product.rows = blocks.size(block);
    product.result = static_cast<Element*>(args.result) + first * args.ld_result;
    run_packed(product, static_cast<float*>(args.memory), [&](int64_t row, int64_t rows, float* to) {
      const Element* const from = static_cast<const Element*>(args.x.data) + (first + row) * args.x.ld;
      with_rows(rows, [&](auto count) {
        for (int64_t k = 0; k < args.inputs; ++k) {
          for (int r = 0; r < count; ++r) to[k * count + r] = as_float(from[r * args.x.ld + k]);
        }
      });
    });
  }
}

}  // namespace

void linear(const LinearProduct& args) {
  if (args.rows <= kFewRows) return few(args);
  if (args.compute == Dtype::kFloat32) return many<float>(args);
  many<uint16_t>(args);
}

}  // namespace taps::cpu
