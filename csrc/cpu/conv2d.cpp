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

// What R pixels of the result see of the first channel under one place of the kernel; null: padding.
template <class Words, int R>
struct Seen {
  using Part = typename Words::Part;
  const typename Words::Element* pixels[R];
  bool adjacent;

  void copy(int64_t offset, Part* to) const {
    constexpr int kStep = Words::kInWord;
    for (int r = 0; r < R; ++r) {
      to[r * kStep] = adjacent    ? Words::part(pixels[0][offset + r])
                      : pixels[r] ? Words::part(pixels[r][offset])
                                  : Part{};
    }
  }
};

// Where element k of the depth of a tile of R rows begins.
template <class Words, int R>
typename Words::Part* place_of(float* packed, int64_t k) {
  constexpr int kInWord = Words::kInWord;
  return reinterpret_cast<typename Words::Part*>(packed + k / kInWord * R) + k % kInWord;
}

// The inputs of R pixels of the result, from pixel `first` on: word k of each next to each other.
template <class Words, int R>
void pack(const Convolution& args, int64_t first, float* to) {
  using Element = typename Words::Element;
  const int64_t places = args.kernel[0] * args.kernel[1];
  Seen<Words, R> seen[kMostPlaces];
  for (int64_t place = 0; place < places; ++place) {
    Seen<Words, R>& own = seen[place];
    own.adjacent = true;
    for (int r = 0; r < R; ++r) {
      const Pixel pixel = pixel_of(args, first + r);
      const int64_t y = pixel.y * args.stride[0] + place / args.kernel[1] * args.dilation[0] - args.padding[0];
      const int64_t x = pixel.x * args.stride[1] + place % args.kernel[1] * args.dilation[1] - args.padding[1];
      const bool inside = y >= 0 && y < args.size[0] && x >= 0 && x < args.size[1];
      own.pixels[r] = !inside ? nullptr
                              : static_cast<const Element*>(args.x.data) + pixel.image * args.x_strides[0] +
                                    y * args.x_strides[2] + x * args.x_strides[3];
      own.adjacent = own.adjacent && inside && own.pixels[r] == own.pixels[0] + r;
    }
  }
  int64_t k = 0;
  if (args.channels_inside) {
    for (int64_t place = 0; place < places; ++place) {
      for (int64_t c = 0; c < args.channels; ++c, ++k) {
        seen[place].copy(c * args.x_strides[1], place_of<Words, R>(to, k));
      }
    }
  } else {
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t place = 0; place < places; ++place, ++k) {
        seen[place].copy(c * args.x_strides[1], place_of<Words, R>(to, k));
      }
    }
  }
  for (; k % Words::kInWord != 0; ++k) {
    for (int r = 0; r < R; ++r) place_of<Words, R>(to, k)[r * Words::kInWord] = {};
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
