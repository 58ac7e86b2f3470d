// The CPU lanes: loops over elements, compiled once per instruction set (lanes.cpp) and chosen at
// run time (isa.cpp). Every set gives the same bits.
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
};

constexpr int kDotSums = 16;

const Lanes& lanes();                     // the chosen set
std::string isa();                        // its name: baseline, avx2, avx512
std::vector<std::string> isas();          // the sets that were compiled and that this machine runs
std::vector<std::string> isas_built();    // the sets that were compiled
void force_isa(const std::string& name);  // "" returns to the best one; for tests

}  // namespace taps::cpu
