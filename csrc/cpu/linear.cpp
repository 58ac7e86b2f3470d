// The forward of a gated linear layer on the CPU, block of rows by block of rows: few rows as they are or copied,
// more of them packed, the outputs shared by the threads. W_t is built anew for each block.
#include <cstring>
#include <vector>

#include "cpu/packed.h"

namespace taps::cpu {
namespace {

constexpr int64_t kMeetingRows = 4, kDecoded = 1024;
constexpr int64_t kMeeting = 1024;          // words: 4096 bytes, the sets of L1
constexpr int64_t kBlockWeights = 1 << 14;  // of a block that serves several products before the next: 64 KB at most

// Words between rows of a copy of x. A power of two would have rows meet in the same sets of L1.
int64_t padded(int64_t words) {
  const int64_t whole = (words + kFewRowsPadding - 1) / kFewRowsPadding * kFewRowsPadding;
  return whole % kMeeting == 0 ? whole + kFewRowsPadding : whole;
}

const char* row_of_x(const LinearProduct& args, int64_t row) {
  return static_cast<const char*>(args.x.data) + row * args.x.ld * size_of(args.compute);
}

}  // namespace

// Few rows of whole vectors are read where they are if they consist of words, unless more of them meet than L1 has
// room for.
int64_t linear_bytes(const LinearProduct& args) {
  if (args.rows > kFewRows) return packed_bytes(args);
  const int64_t words = words_of(args.compute, args.inputs), in_word = 4 / size_of(args.compute);
  const bool as_words = words * in_word == args.inputs && (args.rows == 1 || args.x.ld % in_word == 0);
  if (as_words && words % kFewRowsPadding == 0) {
    if (args.rows <= kMeetingRows || args.x.ld / in_word % kMeeting != 0) return 0;
  }
  return args.rows * padded(words) * 4;
}

namespace {

// One row as words, with zeros up to `ld` of them.
void copy_row(const LinearProduct& args, int64_t row, float* to, int64_t ld) {
  const int64_t words = words_of(args.compute, args.inputs);
  std::memset(to + words - 1, 0, static_cast<size_t>(ld - words + 1) * 4);  // the last may be half an element's
  if (args.compute == Dtype::kBFloat16 && !tiles().pairs) {
    lanes().reconstruct(to, Dtype::kFloat32, 1, {row_of_x(args, row), args.compute, 1}, {nullptr, args.compute, 1}, 1.0,
                        false, args.inputs);
  } else {
    std::memcpy(to, row_of_x(args, row), static_cast<size_t>(args.inputs * size_of(args.compute)));
  }
}

// What is not decoded in registers: as many outputs as are multiplied together have their Delta decoded at a time,
// which then comes from L2.
void few_packed(const LinearProduct& args, const float* x, int64_t ld) {
  constexpr int64_t kTogether = kFewRowsOutputs;
  const int64_t parts = (args.outputs + kTogether - 1) / kTogether, words = kTogether * args.inputs;
  const bool masked = args.packed.codec == Codec::kBitmask;
  std::vector<int64_t> ranks(masked ? static_cast<size_t>(parts) : 0);  // values before each part
  for (int64_t part = 0, rank = 0; masked && part < parts; ++part) {
    ranks[static_cast<size_t>(part)] = rank;
    const int64_t left = args.packed.numel() - part * words;
    rank += count_bits(static_cast<const uint8_t*>(args.packed.codes) + part * words / 8,
                       (left < words ? left : words) / 8);
  }
  const FewRows run = few_rows();
  const Lanes& set = lanes();
  const int64_t grain = words >= kGrain ? 1 : kGrain / words;
  parallel_for(parts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> delta(static_cast<size_t>(words));
    LinearProduct own = args;
    own.packed = {};
    own.delta = {delta.data(), args.inputs};
    own.delta_dtype = Dtype::kFloat32;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kTogether;
      own.outputs = args.outputs - first < kTogether ? args.outputs - first : kTogether;
      const int64_t n = own.outputs * args.inputs;
      int64_t rank = masked ? ranks[static_cast<size_t>(part)] : 0;
      for (int64_t at = 0; at < n; at += kDecoded) {
        const int64_t some = n - at < kDecoded ? n - at : kDecoded;
        set.decode(args.packed, first * args.inputs + at, some, rank, delta.data() + at);
        if (masked) {
          rank += count_bits(static_cast<const uint8_t*>(args.packed.codes) + (first * args.inputs + at) / 8, some / 8);
        }
      }
      const auto behind = [&](const void* data, int64_t elements, Dtype dtype) {
        return static_cast<const char*>(data) + elements * size_of(dtype);
      };
      own.weight.data = behind(args.weight.data, first * args.weight.ld, args.weight_dtype);
      own.bias = args.bias ? behind(args.bias, first, args.compute) : nullptr;
      own.result = static_cast<char*>(args.result) + first * size_of(args.compute);
      run(own, x, ld, 0, own.outputs);
    }
  });
}

// x as few rows are read: where it is, or copied to `memory`.
struct Rows {
  const float* x;
  int64_t ld;
};

Rows rows_of(const LinearProduct& args, void* memory) {
  if (linear_bytes(args) == 0) {
    return {static_cast<const float*>(args.x.data), args.x.ld * size_of(args.compute) / 4};
  }
  float* const copy = static_cast<float*>(memory);
  const int64_t ld = padded(words_of(args.compute, args.inputs));
  for (int64_t row = 0; row < args.rows; ++row) copy_row(args, row, copy + row * ld, ld);
  return {copy, ld};
}

void few(const LinearProduct& args) {
  const auto [x, ld] = rows_of(args, args.memory);
  const bool in_registers = args.packed.codec != Codec::kBitmask && args.compute == Dtype::kFloat32;
  if (args.packed.codes && !in_registers) return few_packed(args, x, ld);
  const FewRows run = few_rows();
  constexpr int64_t kTogether = kFewRowsOutputs;
  const int64_t grain = args.inputs * kTogether >= kGrain ? 1 : kGrain / (args.inputs * kTogether);
  const float* const from = x;
  const int64_t step = ld;
  parallel_for((args.outputs + kTogether - 1) / kTogether, grain, [&](int64_t begin, int64_t end) {
    run(args, from, step, begin * kTogether, end * kTogether < args.outputs ? end * kTogether : args.outputs);
  });
}

void many(const LinearProduct& args) {
  const Split blocks(args.rows, kTiledRows);
  for (int64_t block = 0; block < blocks.parts; ++block) {
    TileProduct product{args};
    const int64_t first = blocks.begin(block);
    product.rows = blocks.size(block);
    product.result = static_cast<char*>(args.result) + first * args.ld_result * size_of(args.compute);
    run_packed(product, static_cast<float*>(args.memory),
               [&](int64_t row, int64_t rows, float* to) { packs().rows(args, first + row, rows, to); });
  }
}

}  // namespace

void linear(const LinearProduct& args) {
  if (args.rows <= kFewRows) return few(args);
  many(args);
}

int64_t linear_together_bytes(const LinearProduct* products, size_t count) {
  int64_t bytes = 0;
  for (size_t i = 0; i < count; ++i) bytes += linear_bytes(products[i]);
  return bytes;
}

// A thread goes through its outputs block by block, and through all products at each: what a block reads of the weight
// stays in L1.
void linear_together(const LinearProduct* products, size_t count, void* memory) {
  if (count == 0) return;
  std::vector<Rows> rows;
  char* free = static_cast<char*>(memory);
  for (size_t i = 0; i < count; ++i) {
    rows.push_back(rows_of(products[i], free));
    free += linear_bytes(products[i]);
  }
  const FewRows run = few_rows();
  const int64_t outputs = products[0].outputs, weights = products[0].inputs * kFewRowsOutputs;
  const int64_t work = weights * static_cast<int64_t>(count);
  const int64_t grain = work >= kGrain ? 1 : kGrain / work;
  const int64_t block = weights >= kBlockWeights ? 1 : kBlockWeights / weights;
  parallel_for((outputs + kFewRowsOutputs - 1) / kFewRowsOutputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = (first + block < end ? first + block : end) * kFewRowsOutputs;
      for (size_t i = 0; i < count; ++i) {
        run(products[i], rows[i].x, rows[i].ld, first * kFewRowsOutputs, last < outputs ? last : outputs);
      }
    }
  });
}

}  // namespace taps::cpu
