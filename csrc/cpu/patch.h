// Patches (docs/patch.md): the elements in which two tensors differ, as numbers from gaps or from a bitmask, and sums
// that prove what they replace. A tensor is its row-major bytes here, in units of 1, 2, 4 or 8 of them. No torch.
#pragma once

#include <cstdint>

namespace taps::cpu {

// sum of key(w) * word(w) mod 2^128 over 8-byte words
struct PatchSum {
  uint64_t low = 0, high = 0;
};

enum class PatchFault : int8_t { kNone, kRange, kTwice, kOpen, kCount };

// The numbers of changed units, ascending. `width`: bytes of a gap's code; 0 for one bit a unit, lowest bit first.
struct PatchIndex {
  const uint8_t* data;
  int64_t bytes;
  int width;
  int64_t units;  // of the tensor
};

struct PatchChecked {
  PatchFault fault = PatchFault::kNone;
  int64_t at = 0;    // the number at fault
  int64_t done = 0;  // units that were summed, written or both before it
  PatchSum sum;
};

struct PatchSizes {
  int64_t count = 0;      // changed units
  int64_t codes[3] = {};  // for gaps of 1, 2 and 4 bytes
};

PatchSum patch_sum(const uint8_t* data, int64_t bytes, int64_t first_word);
PatchSizes patch_measure(const uint8_t* before, const uint8_t* after, int64_t bytes, int unit);
// False where index or values did not have exactly the room that patch_measure told: somebody wrote in between.
bool patch_encode(const uint8_t* before, const uint8_t* after, int64_t bytes, int unit, int width, uint8_t* index,
                  int64_t index_bytes, uint8_t* values, int64_t values_bytes, PatchSum* replaced);
// Proves the index and sums what is at it: of `target`, or where that is null, of `values`. Touches nothing else.
PatchChecked patch_check(const PatchIndex& index, const uint8_t* values, int64_t count, int unit,
                         const uint8_t* target);
// Proves the index alone.
PatchChecked patch_prove(const PatchIndex& index, int64_t count);
// Writes `values`; stops at a fault, which patch_check would have found.
PatchChecked patch_write(const PatchIndex& index, const uint8_t* values, int64_t count, int unit, uint8_t* target);
// patch_check and patch_write in one: writes `values`, sums what was there and keeps it in `old`, `count` units in
// order. patch_write of the first `done` units of `old` puts back what was written, also after a fault.
PatchChecked patch_swap(const PatchIndex& index, const uint8_t* values, int64_t count, int unit, uint8_t* target,
                        uint8_t* old);

}  // namespace taps::cpu
