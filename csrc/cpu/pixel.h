// The pixels of a convolution's result as rows of a product.
#pragma once

#include "kernels.h"

namespace taps::cpu {
namespace {  // it is also compiled for each instruction set

struct Pixel {
  int64_t image, y, x;
};

inline Pixel pixel_of(const Convolution& args, int64_t row) {
  const int64_t width = args.result_size[1], of_image = args.result_size[0] * width;
  return {row / of_image, row % of_image / width, row % width};
}

}  // namespace
}  // namespace taps::cpu
