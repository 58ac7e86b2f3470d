// The CPU kernels that are compiled once per instruction set and chosen at run time (isa.cpp): loops over elements
// (lanes.cpp, encoders.cpp), in which every set gives the same bits, products (few_rows.cpp, tiles.cpp), in which each
// set has an order of sums of its own, and what is multiplied there, packed (packs.cpp).
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace taps::cpu {

// A run of n elements; a stride is in elements.
struct Run {
  const void* data;
  Dtype dtype;
  int64_t stride;
};

struct Lanes {
  // out[i] = scale * (weight[i] + delta[i]); weight.data or delta.data may be null.
  void (*reconstruct)(void* out, Dtype out_dtype, int64_t out_stride, Run weight, Run delta, double scale,
                      bool in_double, int64_t n);
  // Adds the n products to 16 running sums, element i to sum i % 16.
  void (*dot)(Run a, Run b, int64_t n, double* sums);
  bool (*all_finite)(Run run, int64_t n);
  // Elements [begin, begin + n) of a packed Delta; `begin` is a multiple of 64, n at most 1024, `rank` how many values
  // of a bitmask come before it.
  void (*decode)(const PackedDelta& delta, int64_t begin, int64_t n, int64_t rank, float* to);
};

constexpr int kDotSums = 16;

// Which elements a bitmask holds: those whose bits under `mask` are `least` or more.
struct Chosen {
  uint32_t mask, least;
  bool takes(uint32_t bits) const { return (bits & mask) >= least; }
};

// What makes packed Deltas (encoders.cpp), of n elements next to each other.
struct Encoders {
  // Codes and bfloat16 scales of kInt8 or kInt4, from the first element of a group on; false where values are not
  // finite or larger than any scale reaches.
  bool (*groups)(const float* delta, int64_t n, Codec codec, void* codes, uint16_t* scales);
  double (*sum_of_magnitudes)(const float* delta, int64_t n);  // element i in running sum i % 16, these by halves
  void (*signs)(const float* delta, int64_t n, uint8_t* bits);
  int64_t (*count_from)(const float* delta, int64_t n, Chosen chosen);
  // The bits of those chosen and their values, of which there is room for n and 16; returns how many.
  int64_t (*choose)(const float* delta, int64_t n, Chosen chosen, uint8_t* bits, float* values);
};

// The outputs [begin, end) of a gated linear layer: x has `args.rows` <= kFewRows rows of words (word.h), `ld` of them
// apart, with zeros behind the depth up to a multiple of kFewRowsPadding words. fp32, or bf16 with W and Delta in bf16
// or fp32.
using FewRows = void (*)(const LinearProduct& args, const float* x, int64_t ld, int64_t begin, int64_t end);
// About where the tiles become the faster ones: rows 24 and 25 of benchmarks/paths.py.
constexpr int kFewRows = 24, kFewRowsPadding = 16;
constexpr int kFewRowsOutputs = 4;  // that a thread takes at a time

// Rows [first, first + count) of x, or of the pixels under a kernel, side by side: word k of row r is to[k * count +
// r]. At most Tiles::rows of them.
struct Packs {
  void (*rows)(const LinearProduct& args, int64_t first, int64_t count, float* to);
  void (*pixels)(const Convolution& args, int64_t first, int64_t count, float* to);
};

// y = x W_t^T + bias for x packed tile by tile (Split(rows, Tiles::rows)): word k of row r of a tile of R rows, the
// first of which is row m of x, is packed[m * words + k * R + r], where `words` are those of the depth.
struct TileProduct : LinearProduct {
  const float* packed = nullptr;
  const int64_t* result_rows = nullptr;  // where a row of the result begins; null: ld_result apart
  int64_t result_step = 1;               // between two outputs of a row
};

struct Tiles {
  void (*run)(const TileProduct& args, int64_t begin, int64_t end);  // outputs; `begin` a multiple of `outputs`
  int rows, outputs;                                                 // of a tile; of a panel
  bool pairs;                                                        // a word holds two bf16, here and in few rows
  int lanes;
};
constexpr int kTiledRows = 512;  // the most that `run` takes; what it packs of W_t serves so many

// How torch's products run on this machine. bf16: oneDNN widens it to fp32 where there is no dot product of pairs
// (and below AVX-512, torch's own loops are in plain C++), and has a product on AMX, which the kernels have not. fp32:
// the matrix products of MKL keep to AVX2 on AMD's AVX-512 machines; the convolutions are oneDNN's.
bool emulates_bfloat16();
bool has_matrix_unit();
bool halves_matrix_products();

const Lanes& lanes();  // of the chosen set
const Encoders& encoders();
FewRows few_rows();
const Packs& packs();
const Tiles& tiles();
std::string isa();                        // its name: baseline, avx2, avx512, avx512bf16
std::vector<std::string> isas();          // the sets that were compiled and that this machine runs
std::vector<std::string> isas_built();    // the sets that were compiled
void force_isa(const std::string& name);  // "" returns to the best one; for tests, while nothing runs

}  // namespace taps::cpu
