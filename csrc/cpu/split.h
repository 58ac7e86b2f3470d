// n things in as few parts of at most `most` as there can be, all of about one size.
#pragma once

#include <cstdint>

namespace taps::cpu {
namespace {  // it is also compiled for each instruction set

struct Split {
  int64_t n, parts;
  Split(int64_t n, int64_t most) : n(n), parts((n + most - 1) / most) {}
  int64_t begin(int64_t part) const { return part * n / parts; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};

}  // namespace
}  // namespace taps::cpu
