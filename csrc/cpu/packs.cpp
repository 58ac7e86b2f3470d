// Rows of x, or the pixels under a convolution's kernel, packed as the tiles read them. Compiled once per instruction
// set with TAPS_ISA naming it (isa.h); everything but the table at the end has internal linkage.
//
// Rows whose elements are next to each other are turned, a square at a time. Where pixels are, those that a tile sees
// under one place of the kernel lie in a few pieces of memory, the same ones in every channel: each is loaded, put in
// the order of the lanes and joined to the others. A vector is stored whole; what it holds beyond the rows is written
// over by the next word.
#include <algorithm>
#include <type_traits>

#include "cpu/pixel.h"
#include "cpu/transpose.h"

namespace taps::cpu {
namespace {

constexpr int kParts = (kTile + kLanes - 1) / kLanes;  // vectors to a word of all rows
constexpr int kMostPieces = 4;                         // of a place; a tile with more is read one by one

using Words16 = std::conditional_t<kPairs, PairsOfBFloat16, WidenedBFloat16>;

// kLanes words.
template <class Words>
Vec load(const typename Words::Element* from) {
  if constexpr (std::is_same_v<Words, WidenedBFloat16>) return BFloat16::load(from);
  return loaded<Vec>(from);
}

// A word of `count` rows; `end` is that of the tile, behind which another thread writes.
inline void put(float* to, const float* end, Vec word, int64_t count) {
  if (end - to >= kLanes) return store(to, word);
  std::memcpy(to, &word, static_cast<size_t>(count) * sizeof(float));
}

// `count` rows of `elements` each, null for zeros; returns where the next word goes.
template <class Words>
float* turn(const typename Words::Element* const* rows, int64_t count, int64_t elements, float* to, const float* end) {
  using Element = typename Words::Element;
  constexpr int64_t kStep = kLanes * Words::kInWord;
  for (int64_t k = 0; k < elements; k += kStep) {
    const int64_t left = std::min(elements - k, kStep), words = (left + Words::kInWord - 1) / Words::kInWord;
    Vec squares[kParts][kLanes];
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 16  // or it is turned in memory
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t r = part * kLanes + lane;
        Vec& row = squares[part][lane] = Vec{};
        if (r >= count || !rows[r]) continue;
        if (left == kStep) {
          row = load<Words>(rows[r] + k);
        } else {
          Element some[kStep] = {};
          std::memcpy(some, rows[r] + k, static_cast<size_t>(left) * sizeof(Element));
          row = load<Words>(some);
        }
      }
      transpose(squares[part]);
    }
    const auto put_word = [&](int word) {
      for (int part = 0; part < kParts && part * kLanes < count; ++part) {
        put(to + part * kLanes, end, squares[part][word], std::min<int64_t>(count - part * kLanes, kLanes));
      }
      to += count;
    };
    if (words == kLanes) {
#pragma GCC unroll 16
      for (int word = 0; word < kLanes; ++word) put_word(word);
    } else {
      for (int word = 0; word < words; ++word) put_word(word);
    }
  }
  return to;
}

template <class Words>
void pack_rows(const LinearProduct& args, int64_t first, int64_t count, float* to) {
  using Element = typename Words::Element;
  const Element* rows[kTile];
  for (int64_t r = 0; r < count; ++r) rows[r] = static_cast<const Element*>(args.x.data) + (first + r) * args.x.ld;
  const int64_t words = (args.inputs + Words::kInWord - 1) / Words::kInWord;
  turn<Words>(rows, count, args.inputs, to, to + words * count);
}

// What pixels of the result see of the first channel under one place of the kernel, as offsets into x.
struct Place {
  int64_t pixels[kTile];  // negative in the padding
  int64_t most;           // the offset of a channel up to which the pieces are within x
  int pieces;
  int64_t from[kMostPieces];
  Bits lanes[kMostPieces], masks[kMostPieces];
  bool adjacent;  // one after the other

  // `elements` are those of x.
  void divide(int64_t count, int64_t elements) {
    most = -1;
    pieces = 0;
    from[0] = 0;
    lanes[0] = masks[0] = Bits{};
    adjacent = false;
    if (count > kLanes) return;
    int64_t last = 0;
    for (int64_t r = 0; r < count;) {
      if (pixels[r] < 0) {
        ++r;
        continue;
      }
      if (pieces == kMostPieces) return;
      const int64_t begin = from[pieces] = pixels[r];
      lanes[pieces] = masks[pieces] = Bits{};
      for (; r < count; ++r) {
        if (pixels[r] < 0) continue;
        if (pixels[r] < begin || pixels[r] >= begin + kLanes) break;
        lanes[pieces][r] = static_cast<uint32_t>(pixels[r] - begin);
        masks[pieces][r] = ~0u;
      }
      last = std::max(last, begin);
      ++pieces;
    }
    most = elements - kLanes - last;
    adjacent = true;
    for (int64_t r = 0; r < count; ++r) adjacent = adjacent && pixels[r] == from[0] + r;
  }

  // The pixels in the lanes, `offset` from the first channel.
  template <class Element>
  Bits joined(const Element* x, int64_t offset) const {
    if (adjacent) return bits(x + from[0] + offset);
    Bits all = piece(x + offset, 0);
    for (int i = 1; i < pieces; ++i) all |= piece(x + offset, i);
    return all;
  }

 private:
  static Bits bits(const float* from) { return loaded<Bits>(from); }
  static Bits bits(const uint16_t* from) { return as<Bits>(BFloat16::load(from)) >> 16; }

  template <class Element>
  Bits piece(const Element* x, int i) const {
    return picked(bits(x + from[i]), lanes[i]) & masks[i];
  }
};

// The elements of a weight's row in turn: their places and the offsets of their channels.
struct Walk {
  int64_t of_run, left, place_step, offset_step, place_turn, offset_turn;
  int64_t place = 0, offset = 0;

  explicit Walk(const Convolution& args) {
    const int64_t places = args.kernel[0] * args.kernel[1], stride = args.channels > 1 ? args.x_strides[1] : 0;
    const bool inside = args.channels_inside;
    of_run = left = inside ? args.channels : places;
    place_step = inside ? 0 : 1;
    offset_step = inside ? stride : 0;
    place_turn = inside ? 1 : -places;
    offset_turn = inside ? -args.channels * stride : stride;
  }
  void next() {
    place += place_step;
    offset += offset_step;
    if (--left > 0) return;
    left = of_run;
    place += place_turn;
    offset += offset_turn;
  }
};

// Of x, from its first element to its last.
int64_t extent(const Convolution& args) {
  const int64_t images = pixel_of(args, args.rows - 1).image;
  return images * args.x_strides[0] + (args.channels - 1) * args.x_strides[1] + (args.size[0] - 1) * args.x_strides[2] +
         (args.size[1] - 1) * args.x_strides[3] + 1;
}

template <class Words>
void pack_pixels(const Convolution& args, int64_t first, int64_t count, float* to) {
  using Element = typename Words::Element;
  constexpr int kInWord = Words::kInWord;
  const auto* const x = static_cast<const Element*>(args.x.data);
  const int64_t places = args.kernel[0] * args.kernel[1];
  const float* const end = to + (args.inputs + kInWord - 1) / kInWord * count;
  Pixel pixels[kTile];
  for (int64_t r = 0; r < count; ++r) pixels[r] = pixel_of(args, first + r);
  Place of_kernel[kMostPlaces + 1];  // the last is the half of a word behind the depth
  std::fill_n(of_kernel[places].pixels, kTile, -1);
  for (int64_t place = 0; place < places; ++place) {
    Place& own = of_kernel[place];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = pixels[r].y * args.stride[0] + place / args.kernel[1] * args.dilation[0] - args.padding[0];
      const int64_t column = pixels[r].x * args.stride[1] + place % args.kernel[1] * args.dilation[1] - args.padding[1];
      const bool inside = row >= 0 && row < args.size[0] && column >= 0 && column < args.size[1];
      own.pixels[r] =
          inside ? pixels[r].image * args.x_strides[0] + row * args.x_strides[2] + column * args.x_strides[3] : -1;
    }
  }
  if (args.x_strides[1] == 1 && (places == 1 || (args.channels_inside && args.channels % kInWord == 0))) {
    for (int64_t place = 0; place < places; ++place) {
      const Element* rows[kTile];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = of_kernel[place].pixels[r];
        rows[r] = at < 0 ? nullptr : x + at;
      }
      to = turn<Words>(rows, count, args.channels, to, end);
    }
    return;
  }
  const int64_t elements = extent(args);
  for (int64_t place = 0; place <= places; ++place) of_kernel[place].divide(count, elements);
  Walk walk(args);
  for (int64_t k = 0; k < args.inputs; k += kInWord, to += count) {
    const Place* own[kInWord];
    int64_t offset[kInWord];
    bool in_pieces = true;
    for (int i = 0; i < kInWord; ++i, walk.next()) {
      const bool behind = kInWord > 1 && k + i >= args.inputs;
      own[i] = of_kernel + (behind ? places : walk.place);
      offset[i] = behind ? 0 : walk.offset;
      in_pieces = in_pieces && offset[i] <= own[i]->most;
    }
    if (in_pieces) {
      Bits word = own[0]->joined(x, offset[0]);
      if constexpr (kInWord == 2) word |= own[1]->joined(x, offset[1]) << 16;
      if constexpr (std::is_same_v<Words, WidenedBFloat16>) word <<= 16;
      put(to, end, as<Vec>(word), count);
      continue;
    }
    for (int64_t r = 0; r < count; ++r) {
      Element one[kInWord] = {};
      for (int i = 0; i < kInWord; ++i) {
        if (own[i]->pixels[r] >= 0) one[i] = x[own[i]->pixels[r] + offset[i]];
      }
      to[r] = as<float>(Words::word(one));
    }
  }
}

void rows(const LinearProduct& args, int64_t first, int64_t count, float* to) {
  if (args.compute == Dtype::kFloat32) return pack_rows<Floats>(args, first, count, to);
  pack_rows<Words16>(args, first, count, to);
}

void pixels(const Convolution& args, int64_t first, int64_t count, float* to) {
  if (args.compute == Dtype::kFloat32) return pack_pixels<Floats>(args, first, count, to);
  pack_pixels<Words16>(args, first, count, to);
}

}  // namespace

#define TAPS_CONCAT_(a, b) a##b
#define TAPS_CONCAT(a, b) TAPS_CONCAT_(a, b)
extern const Packs TAPS_CONCAT(packs_, TAPS_ISA);
const Packs TAPS_CONCAT(packs_, TAPS_ISA) = {&rows, &pixels};

}  // namespace taps::cpu
