// What the tiles read, packed with any number of lanes on any machine: rows and pixels of random layouts against plain
// loops, to the bit. What is read and written lies in allocations of its exact size.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/isa.h"

namespace taps::cpu {
extern const Packs packs_wide;
}  // namespace taps::cpu

namespace {

using taps::Dtype;

constexpr int64_t kMostRows = TAPS_LANES == 16 ? 12 : 6;  // of a tile

std::mt19937 random_bits(2);

int64_t between(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(most - least + 1));
}

// Elements of random bits, any of which may be a NaN's: packing only moves them.
struct Elements {
  Dtype dtype;
  std::unique_ptr<char[]> bytes;

  Elements(Dtype dtype, int64_t count) : dtype(dtype), bytes(new char[static_cast<size_t>(count * size_of(dtype))]) {
    for (int64_t i = 0; i < count * size_of(dtype); ++i)
      bytes[static_cast<size_t>(i)] = static_cast<char>(random_bits());
  }
  uint32_t at(int64_t index) const {
    uint32_t element = 0;
    std::memcpy(&element, bytes.get() + index * size_of(dtype), static_cast<size_t>(size_of(dtype)));
    return element;
  }
};

// Word k of a row whose elements are `element(index)`, with zeros behind the depth.
template <class F>
uint32_t word_of(Dtype dtype, int64_t k, int64_t depth, const F& element) {
  if (dtype == Dtype::kFloat32) return element(k);
  if (!TAPS_PAIRS) return element(k) << 16;
  return element(2 * k) | (2 * k + 1 < depth ? element(2 * k + 1) << 16 : 0);
}

int64_t words_of(Dtype dtype, int64_t depth) {
  return dtype == Dtype::kBFloat16 && TAPS_PAIRS ? (depth + 1) / 2 : depth;
}

// Of `count` rows packed, `element(row, index)` is what they were.
template <class F>
bool same(const char* what, Dtype dtype, int64_t count, int64_t depth, const std::vector<float>& packed,
          const F& element) {
  for (int64_t k = 0; k < words_of(dtype, depth); ++k) {
    for (int64_t r = 0; r < count; ++r) {
      const uint32_t wanted = word_of(dtype, k, depth, [&](int64_t index) { return element(r, index); });
      uint32_t found;
      std::memcpy(&found, &packed[static_cast<size_t>(k * count + r)], sizeof found);
      if (found == wanted) continue;
      std::printf("%s: word %lld of row %lld of %lld is %08x, expected %08x\n", what, static_cast<long long>(k),
                  static_cast<long long>(r), static_cast<long long>(count), found, wanted);
      return false;
    }
  }
  return true;
}

bool check_rows(Dtype dtype) {
  const int64_t count = between(1, kMostRows), first = between(0, 3), depth = between(1, 150);
  const int64_t ld = depth + between(0, 5);
  const Elements x(dtype, (first + count - 1) * ld + depth);
  taps::LinearProduct args;
  args.inputs = depth;
  args.compute = dtype;
  args.x = {x.bytes.get(), ld};
  std::vector<float> packed(static_cast<size_t>(words_of(dtype, depth) * count));
  taps::cpu::packs_wide.rows(args, first, count, packed.data());
  return same("rows", dtype, count, depth, packed,
              [&](int64_t r, int64_t index) { return x.at((first + r) * ld + index); });
}

bool check_pixels(Dtype dtype) {
  taps::Convolution args;
  args.compute = dtype;
  args.channels = between(1, 40);
  int64_t images = between(1, 9);
  for (int axis = 0; axis < 2; ++axis) {
    args.kernel[axis] = between(1, 3);
    args.stride[axis] = between(1, 3);
    args.dilation[axis] = between(1, 2);
    args.padding[axis] = between(0, 2);
    const int64_t reach = (args.kernel[axis] - 1) * args.dilation[axis] + 1;
    args.size[axis] = std::max(reach - 2 * args.padding[axis], int64_t{1}) + between(0, 12);
    args.result_size[axis] = (args.size[axis] + 2 * args.padding[axis] - reach) / args.stride[axis] + 1;
  }
  args.channels_inside = between(0, 1);
  args.inputs = args.channels * args.kernel[0] * args.kernel[1];
  args.rows = images * args.result_size[0] * args.result_size[1];
  // Dimensions from the innermost out, at times with a gap, at times one image for all.
  const bool last = between(0, 1);
  const int order[4] = {last ? 1 : 3, last ? 3 : 2, last ? 2 : 1, 0};
  const int64_t sizes[4] = {images, args.channels, args.size[0], args.size[1]};
  int64_t step = between(0, 3) == 0 ? 2 : 1, extent = 1;
  for (const int dim : order) {
    args.x_strides[dim] = dim == 0 && between(0, 5) == 0 ? 0 : step;
    step *= sizes[dim];
    step += between(0, 2) == 0;
    extent += (sizes[dim] - 1) * args.x_strides[dim];
  }
  const Elements x(dtype, extent);
  args.x.data = x.bytes.get();
  const int64_t count = std::min(between(1, kMostRows), args.rows), first = between(0, args.rows - count);
  std::vector<float> packed(static_cast<size_t>(words_of(dtype, args.inputs) * count));
  taps::cpu::packs_wide.pixels(args, first, count, packed.data());
  const int64_t places = args.kernel[0] * args.kernel[1];
  return same("pixels", dtype, count, args.inputs, packed, [&](int64_t r, int64_t index) -> uint32_t {
    const int64_t channel = args.channels_inside ? index % args.channels : index / places;
    const int64_t place = args.channels_inside ? index / args.channels : index % places;
    const int64_t column = (first + r) % args.result_size[1], rest = (first + r) / args.result_size[1];
    const int64_t y =
        rest % args.result_size[0] * args.stride[0] + place / args.kernel[1] * args.dilation[0] - args.padding[0];
    const int64_t at = column * args.stride[1] + place % args.kernel[1] * args.dilation[1] - args.padding[1];
    if (y < 0 || y >= args.size[0] || at < 0 || at >= args.size[1]) return 0;
    return x.at(rest / args.result_size[0] * args.x_strides[0] + channel * args.x_strides[1] + y * args.x_strides[2] +
                at * args.x_strides[3]);
  });
}

}  // namespace

int main() {
  int problems = 0;
  for (int round = 0; round < 1000; ++round) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      if (!check_rows(dtype) || !check_pixels(dtype)) return 1;
      problems += 2;
    }
  }
  std::printf("%d problems\n", problems);
  return 0;
}
