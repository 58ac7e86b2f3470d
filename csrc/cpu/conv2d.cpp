// The forward of a gated convolution on the CPU: the pixels under the kernel are packed as the rows of a linear layer,
// a block of them at a time, and W_t is built anew for each block.
#include <vector>

#include "cpu/packed.h"
#include "cpu/pixel.h"

namespace taps::cpu {

int64_t conv2d_bytes(const Convolution& args) { return packed_bytes(args); }

void conv2d(const Convolution& args) {
  const Split blocks(args.rows, kTiledRows);
  std::vector<int64_t> begins;
  for (int64_t block = 0; block < blocks.parts; ++block) {
    TileProduct product{args};
    const int64_t first = blocks.begin(block);
    product.rows = blocks.size(block);
    begins.clear();
    for (int64_t row = first; row < first + product.rows; ++row) {
      const Pixel pixel = pixel_of(args, row);
      begins.push_back(pixel.image * args.result_strides[0] + pixel.y * args.result_strides[2] +
                       pixel.x * args.result_strides[3]);
    }
    product.result_rows = begins.data();
    product.result_step = args.result_strides[1];
    run_packed(product, static_cast<float*>(args.memory),
               [&](int64_t row, int64_t rows, float* to) { packs().pixels(args, first + row, rows, to); });
  }
}

}  // namespace taps::cpu
