// The forward of a gated convolution on the CPU: the pixels under the kernel are packed as the rows of a linear layer,
// a block of them at a time, and W_t is built anew for each block.
#include <vector>

#include "cpu/packed.h"

namespace taps::cpu {
namespace {

struct Pixel {
  int64_t image, y, x;
};

Pixel pixel_of(const Convolution& args, int64_t row) {
  const int64_t width = args.result_size[1], of_image = args.result_size[0] * width;
  return {row / of_image, row % of_image / width, row % width};
}

// What R pixels of the result see of the first channel under one place of the kernel. Of padding every channel is the
// same zero, without a branch.
template <class Element, int R>
struct Seen {
  const Element* pixels[R];
  int64_t masks[R];  // of offsets: all ones, or none
  bool adjacent = false;

  Element at(int r, int64_t offset) const { return pixels[r][offset & masks[r]]; }
};

// The inputs of R pixels of the result, from pixel `first` on: word k of each next to each other.
template <class Words, int R>
void pack(const Convolution& args, int64_t first, float* to) {
  using Element = typename Words::Element;
  constexpr int kInWord = Words::kInWord;
  static constexpr Element kZero = 0;
  const int64_t places = args.kernel[0] * args.kernel[1];
  Pixel pixels[R];
  for (int r = 0; r < R; ++r) pixels[r] = pixel_of(args, first + r);
  Seen<Element, R> seen[kMostPlaces], nothing;  // the latter for the half of a word behind the depth
  for (int64_t place = 0; place < places; ++place) {
    Seen<Element, R>& own = seen[place];
    own.adjacent = true;
    for (int r = 0; r < R; ++r) {
      const int64_t y = pixels[r].y * args.stride[0] + place / args.kernel[1] * args.dilation[0] - args.padding[0];
      const int64_t x = pixels[r].x * args.stride[1] + place % args.kernel[1] * args.dilation[1] - args.padding[1];
      const bool inside = y >= 0 && y < args.size[0] && x >= 0 && x < args.size[1];
      own.masks[r] = inside ? -1 : 0;
      own.pixels[r] = !inside ? &kZero
                              : static_cast<const Element*>(args.x.data) + pixels[r].image * args.x_strides[0] +
                                    y * args.x_strides[2] + x * args.x_strides[3];
      own.adjacent = own.adjacent && inside && own.pixels[r] == own.pixels[0] + r;
    }
  }
  for (int r = 0; r < R; ++r) {
    nothing.pixels[r] = &kZero;
    nothing.masks[r] = 0;
  }
  const int64_t runs = args.channels_inside ? places : args.channels, of_run = args.inputs / runs;
  int64_t run = 0, of = 0;  // the next element: its run and its number there
  for (int64_t k = 0; k < args.inputs; k += kInWord, to += R) {
    const Seen<Element, R>* own[kInWord];
    int64_t offset[kInWord];
    for (int i = 0; i < kInWord; ++i) {
      own[i] = k + i >= args.inputs ? &nothing : seen + (args.channels_inside ? run : of);
      offset[i] = (args.channels_inside ? of : run) * args.x_strides[1];
      if (++of == of_run) {
        of = 0;
        ++run;
      }
    }
    if (kInWord == 1 && own[0]->adjacent) {
      for (int r = 0; r < R; ++r) to[r] = widened(own[0]->pixels[0][offset[0] + r]);
      continue;
    }
    for (int r = 0; r < R; ++r) {
      Element elements[kInWord];
      for (int i = 0; i < kInWord; ++i) elements[i] = own[i]->at(r, offset[i]);
      to[r] = as<float>(Words::word(elements));
    }
  }
}

}  // namespace

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
    run_packed(product, static_cast<float*>(args.memory), [&](int64_t row, int64_t rows, float* to) {
      with_words(args.compute, [&](auto words) {
        with_rows(rows, [&](auto count) { pack<decltype(words), count>(args, first + row, to); });
      });
    });
  }
}

}  // namespace taps::cpu
