// Patches on the CPU. Every number is checked against the tensor's size where it is decoded, also where it is written
// to.
#include "cpu/patch.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace taps::cpu {
namespace {

__extension__ typedef unsigned __int128 Wide;

// splitmix64 at seed 0: the public key of a word, by its number.
inline uint64_t key(uint64_t word) {
  uint64_t z = (word + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

PatchSum split(Wide sum) { return {static_cast<uint64_t>(sum), static_cast<uint64_t>(sum >> 64)}; }

template <class T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// What a unit adds to the sum: its word with zeros in the place of the others.
template <class Unit>
inline Wide term(int64_t at, Unit value) {
  const uint64_t byte = static_cast<uint64_t>(at) * sizeof(Unit);
  return static_cast<Wide>(key(byte >> 3)) * (static_cast<uint64_t>(value) << ((byte & 7) * 8));
}

// What units next to each other in `values` add at their numbers. Apart from the walk through memory: in one loop the
// arithmetic fills the machine's window, and fewer waits overlap.
template <class Unit>
Wide terms(const int64_t* at, const uint8_t* values, int count) {
  Wide sum = 0;
  for (int i = 0; i < count; ++i) sum += term(at[i], load<Unit>(values + i * static_cast<int64_t>(sizeof(Unit))));
  return sum;
}

// Calls each(number) for units that differ.
template <class Unit, class Each>
void for_changes(const uint8_t* before, const uint8_t* after, int64_t bytes, const Each& each) {
  constexpr int64_t kBlock = 64;
  const auto units = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += sizeof(Unit)) {
      if (load<Unit>(before + begin) != load<Unit>(after + begin)) each(begin / static_cast<int64_t>(sizeof(Unit)));
    }
  };
  int64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) {
    uint64_t differs = 0;
    for (int64_t word = 0; word < kBlock; word += 8) {
      differs |= load<uint64_t>(before + at + word) ^ load<uint64_t>(after + at + word);
    }
    if (differs == 0) continue;
    for (int64_t word = at; word < at + kBlock; word += 8) {
      if (load<uint64_t>(before + word) != load<uint64_t>(after + word)) units(word, word + 8);
    }
  }
  units(at, bytes);
}

template <class Code>
constexpr int64_t kEscape = std::numeric_limits<Code>::max();  // adds itself, and the gap goes on

// Numbers from gaps. A gap is the distance from the number before, the first one's from -1.
template <class Code>
class Gaps {
 public:
  explicit Gaps(const PatchIndex& index)
      : codes_(index.data), count_(index.bytes / static_cast<int64_t>(sizeof(Code))), units_(index.units) {}

  // Whether these are `count` numbers of a tensor of `units`; where not, next() says why. A look at each code alone,
  // which the machine takes many at a time.
  static bool hold(const PatchIndex& index, int64_t count) {
    constexpr int64_t kStep = sizeof(Code), kBlock = 1 << 12;  // whose sum of codes fits
    const int64_t codes = index.bytes / kStep;
    int64_t position = -1, ends = 0;
    Code twice = 0, before = 0;
    for (int64_t block = 0; block < codes; block += kBlock) {
      const int64_t stop = std::min(codes, block + kBlock);
      uint64_t sum = 0;
      uint32_t ended = 0;
      for (int64_t i = block; i < stop; ++i) {
        const Code code = load<Code>(index.data + i * kStep);
        sum += code;
        ended += code != kEscape<Code>;
      }
      for (int64_t i = std::max<int64_t>(block, 1); i < stop; ++i) {
        const Code code = load<Code>(index.data + i * kStep), last = load<Code>(index.data + (i - 1) * kStep);
        twice = static_cast<Code>(twice | (static_cast<Code>(code == 0) & static_cast<Code>(last != kEscape<Code>)));
      }
      position += static_cast<int64_t>(sum);
      if (position >= index.units) return false;
      ends += ended;
      before = load<Code>(index.data + (stop - 1) * kStep);
    }
    if (codes == 0) return count == 0;
    return twice == 0 && load<Code>(index.data) != 0 && before != kEscape<Code> && ends == count;
  }

  int next(int64_t* at, int most, PatchChecked* result) {
    int n = sound(at, most);
    while (n < most && code_ < count_) {
      const int64_t code = load<Code>(codes_ + code_++ * static_cast<int64_t>(sizeof(Code)));
      gap_ += code;
      if (gap_ >= units_ - last_) return fail(PatchFault::kRange, result);
      if (code == kEscape<Code>) continue;
      if (gap_ == 0) return fail(last_ < 0 ? PatchFault::kRange : PatchFault::kTwice, result);
      last_ += gap_;
      gap_ = 0;
      at[n++] = last_;
    }
    if (n < most && gap_ != 0) return fail(PatchFault::kOpen, result);
    return n;
  }

 private:
  // The next codes without a branch on what they are, or none at all where one of them is at fault. Positions never go
  // down, so that the last one speaks for the range of all; few enough codes that their sum fits.
  int sound(int64_t* at, int most) {
    const int64_t stop = std::min(count_, code_ + 2 * most);
    int64_t code = code_, position = last_ + gap_;
    unsigned ended = gap_ == 0, twice = 0;
    int n = 0;
    while (n < most && code < stop) {
      const int64_t step = load<Code>(codes_ + code * static_cast<int64_t>(sizeof(Code)));
      ++code;
      position += step;
      at[n] = position;
      twice |= ended & static_cast<unsigned>(step == 0);
      ended = step != kEscape<Code>;
      n += static_cast<int>(ended);
    }
    if (twice != 0 || position >= units_) return 0;
    code_ = code;
    if (n > 0) last_ = at[n - 1];
    gap_ = position - last_;
    return n;
  }

  int fail(PatchFault fault, PatchChecked* result) {
    result->fault = fault;
    result->at = last_ + gap_;
    return 0;
  }

  const uint8_t* codes_;
  int64_t count_, units_, code_ = 0, last_ = -1, gap_ = 0;
};

class Mask {
 public:
  explicit Mask(const PatchIndex& index) : bits_(index.data), bytes_(index.bytes), units_(index.units) {}

  int next(int64_t* at, int most, PatchChecked* result) {
    int n = 0;
    while (n < most) {
      if (word_ == 0) {
        if (byte_ >= bytes_) break;
        std::memcpy(&word_, bits_ + byte_, static_cast<size_t>(std::min<int64_t>(8, bytes_ - byte_)));
        base_ = byte_ * 8;
        byte_ += 8;
        continue;
      }
      at[n] = base_ + __builtin_ctzll(word_);
      word_ &= word_ - 1;
      if (at[n] >= units_) {
        result->fault = PatchFault::kRange;
        result->at = at[n];
        return 0;
      }
      ++n;
    }
    return n;
  }

 private:
  const uint8_t* bits_;
  int64_t bytes_, units_, byte_ = 0, base_ = 0;
  uint64_t word_ = 0;
};

constexpr int kBatch = 128;

// Calls each(number, which) in order, and after a batch of them after(numbers, how many, which is the first). While one
// batch is worked on, the memory of the next is asked for, element by element: those of a sparse patch lie too far
// apart for the machine to guess, and it can wait for few at a time. Calls that write take their pointers along by
// value: bytes may lie anywhere, and what is reached by reference would be read again after each.
template <class Numbers, class Unit, class Each, class After>
void walk(Numbers numbers, int64_t count, const uint8_t* target, PatchChecked* result, Each each, After after) {
  int64_t batches[2][kBatch];
  const auto ask = [&](int64_t at) {
    if (target != nullptr) __builtin_prefetch(target + at * static_cast<int64_t>(sizeof(Unit)), 1);
  };
  int64_t done = 0;
  int now = 0, n = numbers.next(batches[0], kBatch, result);
  for (int i = 0; i < n; ++i) ask(batches[0][i]);
  while (n > 0) {
    const int64_t* at = batches[now];
    const int64_t* ahead = batches[1 - now];
    const int more = numbers.next(batches[1 - now], kBatch, result);
    if (result->fault != PatchFault::kNone) return;
    if (n > count - done) break;
    const int both = std::min(n, more);
    for (int i = 0; i < both; ++i) {
      ask(ahead[i]);
      each(at[i], done + i);
    }
    for (int i = both; i < n; ++i) each(at[i], done + i);
    after(at, n, done);
    done += n;
    result->done = done;
    n = more;
    now = 1 - now;
  }
  if (result->fault == PatchFault::kNone && (n > 0 || done != count)) {
    result->fault = PatchFault::kCount;
    result->at = done + n;
  }
}

template <class Unit, class Each, class After>
void walk_as(const PatchIndex& index, int64_t count, const uint8_t* target, PatchChecked* result, Each each,
             After after) {
  switch (index.width) {
    case 0:
      return walk<Mask, Unit>(Mask(index), count, target, result, each, after);
    case 1:
      return walk<Gaps<uint8_t>, Unit>(Gaps<uint8_t>(index), count, target, result, each, after);
    case 2:
      return walk<Gaps<uint16_t>, Unit>(Gaps<uint16_t>(index), count, target, result, each, after);
    case 4:
      return walk<Gaps<uint32_t>, Unit>(Gaps<uint32_t>(index), count, target, result, each, after);
  }
  throw std::runtime_error("width: expected 0, 1, 2 or 4, got " + std::to_string(index.width));
}

template <class F>
auto with_unit(int unit, const F& f) {
  switch (unit) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
  }
  throw std::runtime_error("unit: expected 1, 2, 4 or 8, got " + std::to_string(unit));
}

// Where codes and values go, with the room that there is.
struct Room {
  uint8_t* at;
  uint8_t* end;
  template <class T>
  bool put(T value) {
    if (end - at < static_cast<int64_t>(sizeof(T))) return false;
    std::memcpy(at, &value, sizeof(T));
    at += sizeof(T);
    return true;
  }
};

template <class Code>
bool put_gap(Room& room, int64_t gap) {
  for (; gap >= kEscape<Code>; gap -= kEscape<Code>) {
    if (!room.put(static_cast<Code>(kEscape<Code>))) return false;
  }
  return room.put(static_cast<Code>(gap));
}

}  // namespace

PatchSum patch_sum(const uint8_t* data, int64_t bytes, int64_t first_word) {
  Wide sums[4] = {};
  const uint64_t first = static_cast<uint64_t>(first_word);
  const int64_t words = bytes / 8;
  int64_t w = 0;
  for (; w + 4 <= words; w += 4) {
    for (int j = 0; j < 4; ++j) {
      sums[j] += static_cast<Wide>(key(first + static_cast<uint64_t>(w + j))) * load<uint64_t>(data + (w + j) * 8);
    }
  }
  for (; w * 8 < bytes; ++w) {
    uint64_t word = 0;
    std::memcpy(&word, data + w * 8, static_cast<size_t>(std::min<int64_t>(8, bytes - w * 8)));
    sums[0] += static_cast<Wide>(key(first + static_cast<uint64_t>(w))) * word;
  }
  return split(sums[0] + sums[1] + sums[2] + sums[3]);
}

PatchSizes patch_measure(const uint8_t* before, const uint8_t* after, int64_t bytes, int unit) {
  PatchSizes sizes;
  int64_t last = -1;
  with_unit(unit, [&](auto zero) {
    for_changes<decltype(zero)>(before, after, bytes, [&](int64_t at) {
      const int64_t gap = at - last;
      last = at;
      ++sizes.count;
      sizes.codes[0] += gap / kEscape<uint8_t> + 1;
      sizes.codes[1] += gap / kEscape<uint16_t> + 1;
      sizes.codes[2] += gap / kEscape<uint32_t> + 1;
    });
  });
  return sizes;
}

bool patch_encode(const uint8_t* before, const uint8_t* after, int64_t bytes, int unit, int width, uint8_t* index,
                  int64_t index_bytes, uint8_t* values, int64_t values_bytes, PatchSum* replaced) {
  Room codes{index, index + index_bytes}, news{values, values + values_bytes};
  if (width == 0) std::memset(index, 0, static_cast<size_t>(index_bytes));
  int64_t last = -1;
  bool fits = true;
  Wide sum = 0;
  with_unit(unit, [&](auto zero) {
    using Unit = decltype(zero);
    for_changes<Unit>(before, after, bytes, [&](int64_t at) {
      const int64_t offset = at * static_cast<int64_t>(sizeof(Unit));
      sum += term(at, load<Unit>(before + offset));
      fits = fits && news.put(load<Unit>(after + offset));
      if (width == 0) {
        fits = fits && at / 8 < index_bytes;
        if (fits) index[at / 8] = static_cast<uint8_t>(index[at / 8] | 1u << (at % 8));
      } else {
        fits = fits && (width == 1   ? put_gap<uint8_t>(codes, at - last)
                        : width == 2 ? put_gap<uint16_t>(codes, at - last)
                                     : put_gap<uint32_t>(codes, at - last));
      }
      last = at;
    });
  });
  *replaced = split(sum);
  return fits && news.at == news.end && (width == 0 || codes.at == codes.end);
}

PatchChecked patch_check(const PatchIndex& index, const uint8_t* values, int64_t count, int unit,
                         const uint8_t* target) {
  PatchChecked result;
  Wide sum = 0;
  with_unit(unit, [&](auto zero) {
    using Unit = decltype(zero);
    constexpr int64_t kSize = sizeof(Unit);
    if (target != nullptr) {
      uint8_t batch[kBatch * kSize];  // all but the last are full
      uint8_t* const found = batch;
      walk_as<Unit>(
          index, count, target, &result,
          [=](int64_t at, int64_t which) {
            std::memcpy(found + which % kBatch * kSize, target + at * kSize, sizeof(Unit));
          },
          [&](const int64_t* at, int n, int64_t) { sum += terms<Unit>(at, found, n); });
    } else {
      walk_as<Unit>(
          index, count, nullptr, &result, [](int64_t, int64_t) {},
          [&](const int64_t* at, int n, int64_t first) { sum += terms<Unit>(at, values + first * kSize, n); });
    }
  });
  result.sum = split(sum);
  return result;
}

PatchChecked patch_prove(const PatchIndex& index, int64_t count) {
  PatchChecked result;
  if ((index.width == 1 && Gaps<uint8_t>::hold(index, count)) ||
      (index.width == 2 && Gaps<uint16_t>::hold(index, count)) ||
      (index.width == 4 && Gaps<uint32_t>::hold(index, count))) {
    return result;
  }
  walk_as<uint8_t>(index, count, nullptr, &result, [](int64_t, int64_t) {}, [](const int64_t*, int, int64_t) {});
  return result;
}

PatchChecked patch_write(const PatchIndex& index, const uint8_t* values, int64_t count, int unit, uint8_t* target) {
  PatchChecked result;
  with_unit(unit, [&](auto zero) {
    using Unit = decltype(zero);
    constexpr int64_t kSize = sizeof(Unit);
    walk_as<Unit>(
        index, count, target, &result,
        [=](int64_t at, int64_t which) { std::memcpy(target + at * kSize, values + which * kSize, sizeof(Unit)); },
        [](const int64_t*, int, int64_t) {});
  });
  return result;
}

PatchChecked patch_swap(const PatchIndex& index, const uint8_t* values, int64_t count, int unit, uint8_t* target,
                        uint8_t* old) {
  PatchChecked result;
  Wide sum = 0;
  with_unit(unit, [&](auto zero) {
    using Unit = decltype(zero);
    constexpr int64_t kSize = sizeof(Unit);
    walk_as<Unit>(
        index, count, target, &result,
        [=](int64_t at, int64_t which) {
          std::memcpy(old + which * kSize, target + at * kSize, sizeof(Unit));
          std::memcpy(target + at * kSize, values + which * kSize, sizeof(Unit));
        },
        [&](const int64_t* at, int n, int64_t first) { sum += terms<Unit>(at, old + first * kSize, n); });
  });
  result.sum = split(sum);
  return result;
}

}  // namespace taps::cpu
