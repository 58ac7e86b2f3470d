"""Mistakes to plant in the device's kernels, and the sources with all of them in place, one to be chosen at run time.

A mistake is written where it stands: `if («r >= rows → r > rows») return;` is a piece of one of the headers, with what
is to become of a part of it. The headers are changed as text, line by line, so that lines keep their numbers: an
expression becomes `(taps_planted == 7 ? (r > rows) : (r >= rows))`, a statement an `if`. What must be known to the
compiler cannot be chosen that late; such a mistake is `constant`, and needs a program of its own.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from host_build import CUDA, KERNEL_HEADERS

SOURCES = {name: (CUDA / name).read_text(encoding="utf-8") for name in KERNEL_HEADERS}
# Included before everything else: which mistake is made, by its number; 0 is none.
CHOICE = """#pragma once
#include <cstdlib>
inline const int taps_planted = std::atoi(std::getenv("TAPS_PLANTED"));
"""
PART = re.compile("«(.*?) → (.*?)»", re.DOTALL)


class Mistake(NamedTuple):
    """The program then says `said`, and where that names a line, it holds one of `shows`."""

    places: str | tuple[str, ...]
    said: str
    shows: tuple[str, ...] = ()
    constant: bool = False


# Beyond its allocation: next to it, or so far that no memory is there.
WRONG, BEYOND = "expected .*, got", "heap-buffer-overflow|SEGV"
READS = ("ldsm_x4", "ld(tile", "ld2(tile")
WAIT, SYNC = "«cp_wait<kStages - 2>(); → {}»\n", "«block_sync(); → {}»  // what everyone fetched"

MISTAKES = {
    # --- the main loop, and what it fetches
    "no barrier": Mistake(SYNC.format(";"), r"race at ([\w.]+):(\d+)", READS),
    "wait for too few": Mistake(WAIT.format("cp_wait<kStages - 1>();"), r"pending copy at ([\w.]+):(\d+)", READS),
    "barrier before the wait": Mistake(
        (WAIT.format("block_sync();"), SYNC.format("cp_wait<kStages - 2>();")),
        r"(?:pending copy|race) at ([\w.]+):(\d+)",
        READS,
    ),
    "fetched before the barrier": Mistake(
        (
            WAIT.format("cp_wait<kStages - 2>(); load(step + kStages - 1, next);"),
            "      «load(step + kStages - 1, next); → ;»",
        ),
        r"race at ([\w.]+):(\d+)",
        ("cp_async<", "st(tile", *READS),
    ),
    "stage used too early": Mistake(
        "int now = 0, next = «kStages - 1 → 0»;", r"(?:race|pending copy) at ([\w.]+):(\d+)", READS
    ),
    "rows, one too many": Mistake("«r < rows → r <= rows» && count", BEYOND),
    "columns, one too many": Mistake(
        "«(kTurned ? left_ : depth) → (kTurned ? left_ : depth) + 1» - column", f"{BEYOND}|{WRONG}"
    ),
    "rows of whole stages, one too many": Mistake("kTurned || «r < left_ → r <= left_»", BEYOND),
    "columns at the edge taken for whole ones": Mistake("!kTurned || «left_ == kAcross → true»", f"{BEYOND}|{WRONG}"),
    "a short stage taken for a whole one": Mistake(
        "end > begin ? static_cast<int>((«end - begin → end - begin + S::kDepth - 1») / S::kDepth) : 0",
        f"{BEYOND}|{WRONG}",
    ),
    "a stage skipped": Mistake(
        "(tile, depth);\n    }\n    next_ += «kTurned ? kDepth * ld_ : kDepth → kTurned ? kDepth * ld_ : kDepth + 8»;",
        f"{BEYOND}|{WRONG}",
    ),
    "a whole stage skipped": Mistake(
        "? 16u : 0u);\n    }\n    next_ += «kTurned ? kDepth * ld_ : kDepth → kTurned ? kDepth * ld_ : kDepth + 8»;",
        f"{BEYOND}|{WRONG}",
    ),
    "rows off 16 bytes": Mistake(
        "(sizeof(T) == 2 ? «8 → 4» : 4))", r"misaligned at ([\w.]+):(\d+)", ("cp_async<", "ldsm_x4"), constant=True
    ),
    "slices written over a stage": Mistake(
        "«block_sync(); → ;»  // the stages, or", r"race at ([\w.]+):(\d+)", ("st(sums", *READS)
    ),
    "slices read too early": Mistake(
        "        });\n      }\n      «block_sync(); → ;»\n      if (S::slice() == 0)",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld(sums", "st(sums"),
    ),
    "both slices take the same depth": Mistake("«S::slice() → 0» * kPart + within", WRONG),
    # --- fragments
    "half a fragment beside": Mistake("lane() % 4 * 2 + half * «8 → 4»;", WRONG),
    "halves of columns exchanged": Mistake(
        "first + «lane() / 16 * 8 → lane() / 8 % 2 * 8» + lane() % 8) * kStride + k + "
        "«lane() / 8 % 2 * 8 → lane() / 16 * 8»",
        WRONG,
    ),
    "wrong rows for ldmatrix": Mistake("first + «lane() % 16 → lane() % 8») * kStride", WRONG),
    "turned halves exchanged": Mistake(
        "(k + «lane() / 16 * 8 → lane() / 8 % 2 * 8» + lane() % 8) * kStride + first + "
        "«lane() / 8 % 2 * 8 → lane() / 16 * 8»",
        WRONG,
    ),
    "columns exchanged": Mistake("b[j][1] = «both[1] → both[2]», b[j + 1][0] = «both[2] → both[1]»", WRONG),
    "an element taken for its neighbour": Mistake("one<kStride>(tile, «k + 1 → k», column)", WRONG),
    "closed, but Delta is read": Mistake("if («is_open(p.gate) → true») {  // asked", f"{WRONG}|SEGV|null pointer"),
    "half of a fragment without Delta": Mistake("b[j][1] = «add2<T>(b[j][1], change[j][1]) → b[j][1]»;", WRONG),
    # --- the products, and what leaves
    "rows of x, one too many": Mistake("p.x, place.row, «p.rows → p.rows + 1»)", BEYOND),
    "rows of the weight, one too many": Mistake(
        "B<true>(p.weight, p.delta, place.column, «columns → columns + 1»)", BEYOND
    ),
    "depth of the input gradient, one too many": Mistake("kBackward ? «p.outputs → p.outputs + 1» : p.inputs;", BEYOND),
    "rows of the weight gradient's depth, one too many": Mistake("0, «p.rows → p.rows + 1»)", BEYOND),
    "rows of the result, one too many": Mistake("if («r >= rows → r > rows»)", BEYOND),
    "columns of the result, one too many": Mistake("if («c + e >= columns → c + e > columns»)", f"{BEYOND}|{WRONG}"),
    "rows of Delta's gradient, one too many": Mistake(
        "if («r < p.outputs → r <= p.outputs» && c < p.inputs) to[0]", BEYOND
    ),
    "columns of Delta's gradient, one too many": Mistake(
        "if (r < p.outputs && «c + 1 < p.inputs → c < p.inputs») to[1]", f"{BEYOND}|{WRONG}"
    ),
    "columns of Delta, one too many": Mistake(
        "if (r < p.outputs && «c + 1 < p.inputs → c < p.inputs») change", f"{BEYOND}|{WRONG}"
    ),
    "a tile at the edge taken for a whole one": Mistake(
        "«place.row + S::kRows <= p.outputs → place.row < p.outputs»", BEYOND
    ),
    "splits begin at zero": Mistake("begin = «bid_y() → 0» * p.depth_of_split", WRONG),
    "bias added by every split": Mistake("if («p.splits > 1 → p.splits > 2») {", WRONG),
    "sums written over a stage": Mistake(
        "«block_sync(); → ;»  // the stages have been read", r"race at ([\w.]+):(\d+)", ("st(sums", "ldsm_x4")
    ),
    "sums read too early": Mistake(
        "st(sums, warp(), dot);\n    «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld(sums", "st(sums"),
    ),
    "a lane short": Mistake("mask = «16 → 8»;", WRONG),
    "closed, but its gradient leaves": Mistake("«open → true» ? scale * first", WRONG),
    "scale forgotten": Mistake("open ? «scale * second → second»", WRONG),
    "pairs of rows that cannot be read in them": Mistake(
        "«View<D>(p.delta).even() → true» && ", "runtime error: .*misaligned"
    ),
    "pairs from an odd element": Mistake(
        "return («reinterpret_cast<uintptr_t>(data) → uintptr_t{0}» | static_cast<uintptr_t>(ld) * sizeof(E)) % (2",
        "runtime error: .*misaligned",
    ),
    "<G, Delta> in fp32": Mistake(
        "dot += «static_cast<double>(first) * to_f32(change[at].x) → first * to_f32(change[at].x)»;", "expected|FAILED"
    ),
    "splits added from the last": Mistake("partial[«split → (p.splits - 1 - split)» * rows * columns + at]", WRONG),
    # --- splits that the blocks of a cluster add
    "clusters: sums written over a stage": Mistake(
        "«block_sync(); → ;»  // the stages are not", r"race at ([\w.]+):(\d+)", ("st(sums", *READS)
    ),
    "clusters: sums read too early": Mistake(
        "«cluster_sync(); → ;»  // all sums are there",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld16_of(", "st(sums"),
    ),
    "clusters: a barrier of the block alone": Mistake(
        "«cluster_sync(); → block_sync();»  // all sums are there",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld16_of(", "st(sums"),
    ),
    "clusters: a block ends while its sums are read": Mistake(
        "«cluster_sync(); → ;»  // no block ends", r"ended at ([\w.]+):(\d+)", ("ld16_of(",)
    ),
    "clusters: splits added from the last": Mistake(
        "part[k] = ld16_of(rank + k < blocks ? «rank + k → blocks - 1 - rank - k» : cluster_rank(), sums",
        WRONG,
    ),
    "clusters: every block adds the same rows": Mistake("blocks + «cluster_rank() → 0»,", WRONG),
    "clusters: the first of four columns four times": Mistake("float_of(part[k].word[«e → 0»])", WRONG),
    "clusters: a block too few": Mistake("const unsigned blocks = «cluster_blocks() → cluster_blocks() - 1»;", WRONG),
    "clusters: rows of the result, one too many": Mistake(
        "last = «below < S::kRows → below + 1 < S::kRows» ? static_cast<unsigned>(«below → below + 1»)", BEYOND
    ),
    "clusters: columns of the result, one too many": Mistake(
        "if («c < columns → c <= columns») result", f"{BEYOND}|{WRONG}"
    ),
    "clusters: no bias": Mistake("from_f32<T>(«bias → nullptr» ? total[e]", WRONG),
    # --- up to four rows without tensor cores
    "few rows: closed, but Delta is read": Mistake(
        "if («is_open(p.gate) → true») {  // once", f"{WRONG}|SEGV|null pointer"
    ),
    "few rows: every slice begins at zero": Mistake("begin = «slice * p.depth_of_split → 0», last", WRONG),
    "few rows: a slice to the depth's end": Mistake("end = «last < p.inputs ? last : p.inputs → p.inputs»;", WRONG),
    "few rows: a slice beyond the depth": Mistake(
        "end = «last < p.inputs ? last : p.inputs → last»;", f"{WRONG}|{BEYOND}"
    ),
    "few rows: a warp's outputs for all": Mistake("output = first + «group → 0» * kOutputs;", WRONG),
    "few rows: a block's outputs for all": Mistake("static_cast<int64_t>(«bid_x() → 0») * groups", WRONG),
    "few rows: outputs, one too many": Mistake("«first + o >= p.outputs → first + o > p.outputs») return", BEYOND),
    "few rows: rows, one too many": Mistake("if («m >= p.rows → m > p.rows» ||", f"{WRONG}|{BEYOND}"),
    "few rows: a row of x that is not there": Mistake("row = «m < p.rows ? m : p.rows - 1 → m»;", BEYOND),
    "few rows: an output that is not there": Mistake(
        "row = «output + o < p.outputs ? output + o : p.outputs - 1 → output + o»;", BEYOND
    ),
    "few rows: a lane short": Mistake("apart = «16 → 8»;", WRONG),
    "few rows: sums read too early": Mistake(
        "sum[o][m]);\n      }\n    }\n    «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld(sums", "st(sums"),
    ),
    "few rows: all warps leave their sums in one place": Mistake(
        "st(sums, («warp() → 0» * kOutputs", r"(?:race|uninitialised) at ([\w.]+):(\d+)", ("ld(sums", "st(sums")
    ),
    "few rows: slices added from the last": Mistake("* slices + «s → (slices - 1 - s)») * kOutputs", WRONG),
    "few rows: slices forgotten": Mistake("s < «slices → 1»; ++s", WRONG),
    "few rows: no bias": Mistake("if («p.bias → nullptr») total", WRONG),
    "few rows: pieces where x is off 16 bytes": Mistake(
        "piece = «x.piece() < weight.piece() ? x.piece() : weight.piece() → weight.piece()»;",
        "runtime error: .*misaligned",
    ),
    "few rows: pieces where W is off 16 bytes": Mistake(
        "piece = «x.piece() < weight.piece() ? x.piece() : weight.piece() → x.piece()»;",
        r"misaligned at ([\w.]+):(\d+)",
        ("gld16_once",),
    ),
    "few rows: pieces where Delta is off 16 bytes": Mistake(
        "if (kOpen && «delta.piece() < piece → false») piece", r"misaligned at ([\w.]+):(\d+)", ("gld16_once",)
    ),
    "few rows: pieces of a depth without": Mistake("piece == 16 && «p.inputs % kPiece == 0 → true») {", BEYOND),
    "few rows: pairs of odd elements": Mistake("even = «piece >= 4 → true» && p.inputs", "runtime error: .*misaligned"),
    "few rows: pairs of an odd depth": Mistake("piece >= 4 && «p.inputs % 2 == 0 → true»;", f"{WRONG}|{BEYOND}"),
    "few rows: a part of a step taken for a whole one": Mistake(
        "«at + kTogether * kStep <= end → at < end»; at += kTogether", f"{WRONG}|{BEYOND}"
    ),
    "few rows: the rest of the depth forgotten": Mistake("if («at < end → false») step<false", WRONG),
    "few rows: a step skipped": Mistake(
        "left -= by;\n#pragma unroll\n      for (int m = 0; m < kRows; ++m) x[m] += «by → by + 8»;", f"{WRONG}|{BEYOND}"
    ),
    "few rows: elements beyond the depth": Mistake("left = «place.left - k → place.left»;", f"{WRONG}|{BEYOND}"),
    "few rows: the second of two beyond the depth": Mistake("if («left > 1 → left > 0») both.y", f"{WRONG}|{BEYOND}"),
    "few rows: half of a piece without Delta": Mistake(
        "both = {both.x + change.x, «both.y + change.y → both.y»};", WRONG
    ),
    "few rows: Delta forgotten among elements": Mistake("own[o] = {«own[o].x + change.x → own[o].x»,", WRONG),
    "few rows: W_t not rounded among elements": Mistake("{«to_f32(from_f32<T>(own[o].x)) → own[o].x»,", WRONG),
    "few rows: halves of a word exchanged": Mistake(
        "to_f32(E{static_cast<uint16_t>(«word → word >> 16»)}), to_f32(E{static_cast<uint16_t>(«word >> 16 → word»)})",
        WRONG,
    ),
    # --- the pixels of a convolution
    "pixels, one too many": Mistake("«first + row() < p.rows → first + row() <= p.rows» ?", BEYOND),
    "lines of the result for its columns": Mistake("static_cast<int>(line % «rows → columns»)", f"{BEYOND}|{WRONG}"),
    "the first image for all": Mistake("image_ += «n → 0» * p.x_strides[0];", WRONG),
    "the stride across for that down": Mistake("static_cast<int>(«p.stride[0] → p.stride[1]»)", f"{BEYOND}|{WRONG}"),
    "the padding across for that down": Mistake("static_cast<int>(«p.padding[0] → p.padding[1]»)", WRONG),
    "a line of the image too many": Mistake(
        "«static_cast<unsigned>(h_) < height_ → static_cast<unsigned>(h_) <= height_»", f"{BEYOND}|{WRONG}"
    ),
    "a column of the image too many": Mistake(
        "«static_cast<unsigned>(w_) < width_ → static_cast<unsigned>(w_) <= width_»", f"{BEYOND}|{WRONG}"
    ),
    "lines above the image": Mistake(
        "inside_ = «static_cast<unsigned>(h_) < height_ → h_ < static_cast<int>(height_)»", f"{BEYOND}|{WRONG}"
    ),
    "a place of the kernel too late": Mistake("if («c_ < channels_ → c_ <= channels_») return;", f"{BEYOND}|{WRONG}"),
    "one place of the kernel a stage": Mistake("} while («c_ >= channels_ → false»);", f"{BEYOND}|{WRONG}"),
    "a line of the kernel without an end": Mistake("if («w_ == end_ → false») w_", WRONG),
    "the dilation across for that down": Mistake("across_, h_ += «down_ → across_»;", WRONG),
    "a split begins at the first place": Mistake("place = «at / channels_ → 0»;", WRONG),
    "a split begins at the first channel": Mistake("c_ = «at % channels_ → 0»;", WRONG),
    "behind the last place of the kernel": Mistake("inside_ && «column() < depth → true»", WRONG),
    "more threads than pieces": Mistake("«row() >= S::kRows → false»;", r"(?:race|out of range) at|expected .*, got"),
    "the first tile's pixels for all": Mistake("left(p, «place.row → 0»);", WRONG),
    "the depth of one place": Mistake("p.outputs, «p.inputs → p.channels»);", WRONG),
    # --- mixed batches
    "mixed: an id behind the last task's": Mistake("id < -1 || «id >= m.all_tasks → id > m.all_tasks»", WRONG),
    "mixed: an id before the base's": Mistake("if («id < -1 → id < -2» || id >=", f"{WRONG}|{BEYOND}"),
    "mixed: tasks counted from the first of all": Mistake(
        "task = «id - m.first_task → id»;", f"{WRONG}|{BEYOND}|index .* out of bounds"
    ),
    "mixed: closed tasks beside the base": Mistake("return «m.tasks[task].joins → false» ? 0", WRONG),
    "mixed: ids written over those that are looked at": Mistake(
        "«block_sync(); → ;»  // those before have", r"race at ([\w.]+):(\d+)", ("st(groups", "ld(groups")
    ),
    "mixed: ids looked at too early": Mistake(
        "«block_sync(); → ;»  // these are there",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("st(groups", "ld(groups"),
    ),
    "mixed: ids that are not there": Mistake(
        "count = «left < kIdsAtOnce ? static_cast<unsigned>(left) : kIdsAtOnce → kIdsAtOnce»;", f"{BEYOND}|{WRONG}"
    ),
    "mixed: ids next to each other": Mistake("m.ids[(begin + i) * «m.ids_step → 1»]", WRONG),
    "mixed: samples counted from the chunk's first": Mistake("each(«static_cast<int32_t>(begin) → 0» +", WRONG),
    "mixed: groups added up too early": Mistake(
        "«block_sync(); → ;»  // all groups are", r"(?:race|uninitialised) at ([\w.]+):(\d+)", ("counts",)
    ),
    "mixed: a group begins behind its own": Mistake(
        "if («before < group → before <= group») start", f"{WRONG}|{BEYOND}"
    ),
    "mixed: the last tile of a group forgotten": Mistake(
        "end += («count * each + tile - 1 → count * each») / tile;", WRONG
    ),
    "mixed: the base's samples in the order of others": Mistake(
        "if («other == group → other <= group») m.order", f"{WRONG}|{BEYOND}"
    ),
    "mixed: tiles before their ends": Mistake(
        "«block_sync(); → ;»  // the ends of all", r"(?:race|uninitialised) at ([\w.]+):(\d+)", ("ends",)
    ),
    "mixed: a tile of the group before": Mistake(
        "if («slot < ld(ends, static_cast<unsigned>(middle)) → slot <= ld(ends, static_cast<unsigned>(middle))») {",
        WRONG,
    ),
    "mixed: every tile of a group is its first": Mistake(
        "begin = ld(starts, static_cast<unsigned>(group)) * each + «within * tile → 0»;", WRONG
    ),
    "mixed: a tile of more rows than there are": Mistake(
        "begin, «left < tile ? left : tile → tile», 0}", f"{WRONG}|{BEYOND}"
    ),
    "mixed: one row of a sample for all": Mistake("static_cast<int32_t>(«at % each → at * 0»);", WRONG),
    "mixed: rows that a tile has not": Mistake(
        "there_ = «row < count → true»;", "uninitialised|AddressSanitizer|runtime error"
    ),
    "mixed: rows of pieces, one too many": Mistake(
        "there = «row < count_ → row <= count_» && elements", "uninitialised|AddressSanitizer|runtime error"
    ),
    "mixed: columns of pieces, one too many": Mistake(
        "left = «depth - column → depth + 1 - column»;", f"{BEYOND}|{WRONG}"
    ),
    "mixed: pieces of the first stage": Mistake("ld_ + «at_ → 0» + column;", WRONG),
    "mixed: more threads than rows": Mistake(
        "if («Mine::kPass == S::kRows || Mine::row() < S::kRows → true»)", r"(?:race|out of range) at|expected .*, got"
    ),
    "mixed: pieces of 16 bytes of rows off them": Mistake(
        "«return piece_ == 16; → return true;» }\n  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) {\n"
        "    using Mine",
        r"misaligned at ([\w.]+):(\d+)",
        ("cp_async<",),
    ),
    "mixed: rows of another task": Mistake(
        "there = kWhole || («row < depth → true» && elements > 0);", f"{WRONG}|{BEYOND}"
    ),
    "mixed: columns at the edge taken for whole ones": Mistake(
        "piece_ == 16 && «left_ == kAcross → true»; }\n  TAPS_DEVICE void fetch_whole(sh<unsigned char> stage) {\n"
        "    pieces",
        f"{WRONG}|{BEYOND}",
    ),
    "mixed: columns of G's depth, one too many": Mistake(
        "left = «left_ - column → left_ + 1 - column»;\n    const int elements = kWhole", f"{WRONG}|{BEYOND}"
    ),
    "mixed: every task's rows from the first": Mistake("from += row_at(m_, «at_ + row → row») * ld_", WRONG),
    "mixed: tiles that are not in use": Mistake(
        "if («slot >= static_cast<unsigned>(*m.used) → false») return;",
        f"{WRONG}|{BEYOND}|uninitialised|out of range|runtime error",
    ),
    "mixed: rows' numbers read too early": Mistake(
        "«block_sync(); → ;»  // the rows' numbers", r"(?:race|uninitialised) at ([\w.]+):(\d+)", ("ld(rows", "st(rows")
    ),
    "mixed: rows of no task with a task's weight": Mistake(
        "if («tile.group > m.count → tile.group > m.count + 1») {", f"{WRONG}|{BEYOND}"
    ),
    "mixed: the last task's rows for those of none": Mistake(
        "if («tile.group > m.count → tile.group >= m.count») {", WRONG
    ),
    "mixed: closed, but Delta is read": Mistake(
        "task >= 0 && «is_open(m.tasks[task].gate) → true»", f"{WRONG}|SEGV|null pointer"
    ),
    "mixed: the first task's Delta": Mistake("m.tasks[«task → 0»].delta, column, columns", WRONG),
    "mixed: columns of another tile": Mistake("column = static_cast<int64_t>(«bid_x() / m.slots → 0u»)", WRONG),
    "mixed: sums of every slice": Mistake(
        "if («S::slice() != 0 → false») return;\n    const T* const bias = static_cast<const T*>(p.bias);\n"
        "    for_pairs",
        WRONG,
    ),
    "mixed: a bias for the first of two": Mistake("if (bias && «c + 1 < columns → false») second", WRONG),
    "mixed: a bias too many": Mistake("if (bias && «c + 1 < columns → c < columns») second", BEYOND),
    "mixed: rows of the result, one too many": Mistake(
        "if («static_cast<int>(i) >= tile.rows → static_cast<int>(i) > tile.rows» ||",
        "uninitialised|AddressSanitizer|runtime error",
    ),
    "mixed: columns of the result, one too many": Mistake(
        "if («column + j + 1 < columns → column + j < columns») to[1]", f"{BEYOND}|{WRONG}"
    ),
    "mixed: the rows of the task before": Mistake(
        "first = m.starts[«bid_y() + 1 → bid_y()»] * each", f"{WRONG}|{BEYOND}"
    ),
    "mixed: another task's gradient asked for": Mistake("task = m.tasks[«bid_y() → 0u»];\n    if", WRONG),
    "mixed: no sum of a task without rows": Mistake("if («rows == 0 → false» && task.score_gradient", WRONG),
    "mixed: sums of all tasks in one place": Mistake("at = static_cast<int64_t>(«bid_y() → 0u») * nblocks_x()", WRONG),
    "mixed: sums of the first task for all": Mistake("m.partials + «bid_x() → 0u» * count", WRONG),
    "mixed: the gradient of a closed task": Mistake("open = «is_open(task.gate) → true»;", WRONG),
    # --- the gate
    "the threshold not in the score's precision": Mistake(
        "«*static_cast<const float*>(gate.score) >= static_cast<float>(gate.threshold) → "
        "*static_cast<const float*>(gate.score) >= gate.threshold»",
        WRONG,
    ),
    "closed at the threshold": Mistake(
        "«*static_cast<const double*>(gate.score) >= gate.threshold → "
        "*static_cast<const double*>(gate.score) > gate.threshold»",
        WRONG,
    ),
    "NaN opens": Mistake(
        "«*static_cast<const float*>(gate.score) >= static_cast<float>(gate.threshold) → "
        "!(*static_cast<const float*>(gate.score) < static_cast<float>(gate.threshold))»",
        WRONG,
    ),
    # --- W_t as a tensor, and the dot product
    "a vector too many": Mistake("vectors ? «count → (count + 7)» / kVector : 0", BEYOND),
    "an element too many": Mistake("«i < count → i <= count»; i += step", BEYOND),
    "an element too few": Mistake("«i < count → i < count - 1»; i += step", WRONG),
    "vectors where rows are misaligned": Mistake(
        "«reinterpret_cast<uintptr_t>(data) % 16 == 0 → true»;",
        r"misaligned at ([\w.]+):(\d+)",
        ("gld16_once", "gst16"),
    ),
    "an open Delta is not added": Mistake("(open ? «weight + delta → weight» : weight)", WRONG),
    "a closed Delta is taken alone": Mistake(
        "bool open = args.delta && «is_open(args.gate) → true»;\n  const int64_t count", WRONG
    ),
    "scale of a rebuild forgotten": Mistake("«scale == T(1) ? sum : sum * scale → sum»", WRONG),
    "halves of a word exchanged": Mistake("(«i → (i + 1)» % 2 * 16)", WRONG),
    "words of a double exchanged": Mistake(
        "{{«low_of(first) → high_of(first)», «high_of(first) → low_of(first)»,", WRONG
    ),
    "the next tensor's block": Mistake("«block < args.end[middle] → block <= args.end[middle]»", f"{WRONG}|{BEYOND}"),
    "a tensor's first chunk": Mistake("(block - («item > 0 ? args.end[item - 1] : 0 → 0»))", f"{WRONG}|{BEYOND}"),
    "a chunk beyond its tensor": Mistake("«left < kForeachChunk ? left : kForeachChunk → kForeachChunk»", BEYOND),
    "the innermost size for all": Mistake(
        "index /= «walk.sizes[dim] → walk.sizes[walk.ndim - 1]»", f"{WRONG}|{BEYOND}"
    ),
    "no weight, but it is read": Mistake(
        "«args.weight ? load_one<T>(args.weight, args.weight_dtype, at[1]) : T(0) → "
        "load_one<T>(args.weight, args.weight_dtype, at[1])»",
        "SEGV|null pointer",
    ),
    "a closed layer's G leaves": Mistake("i, «open ? gradient : T(0) → gradient»);", WRONG),
    "a vector of a closed layer's G leaves": Mistake("= «open ? gradient[k] : T(0) → gradient[k]»;", WRONG),
    "an open layer's G is not read": Mistake("reads = «dot || open → dot»;", WRONG),
    "the score of a closed layer forgotten": Mistake("«if (!dot) return; → if (!dot || !open) return;»", WRONG),
    "products of the tail forgotten": Mistake("if («dot → false») sum += static_cast<double>(gradient) *", WRONG),
    "an element of a tensor too many": Mistake("«i < chunk.end → i <= chunk.end»; i += nthreads()", BEYOND),
    "a turned gradient read as it lies": Mistake("if («one.outer == 0 → true») return at;", WRONG),
    "a turned gradient's rows taken for one": Mistake("first = «at / row * row → 0»;", f"{WRONG}|{BEYOND}"),
    "another tensor's chunks added": Mistake("first = «item > 0 ? args.end[item - 1] : 0 → 0»;", WRONG),
    "chunks added up to the last tensor": Mistake("«args.end[item] - first → args.end[args.count - 1] - first»", WRONG),
    "vectors where Delta's gradient is misaligned": Mistake(
        "&& «aligned(one.delta_gradient) → true»", r"misaligned at ([\w.]+):(\d+)", ("gst16",)
    ),
    "sums of more chunks than threads": Mistake(
        "«i < count → i < nthreads()»; i += nthreads()) sum", f"{BEYOND}|{WRONG}"
    ),
    "rows of a chunk beyond the end": Mistake(
        "begin + «(left < per_chunk ? left : per_chunk) → per_chunk»", f"{BEYOND}|{WRONG}"
    ),
    "scale of a rebuild in fp32": Mistake("«static_cast<T>(args.scale) → static_cast<float>(args.scale)»;", WRONG),
    "another operand's strides": Mistake(
        "position * «walk.strides[k][dim] → walk.strides[0][dim]»", f"{WRONG}|{BEYOND}"
    ),
    "products of a chunk beyond the end": Mistake(
        "begin + «(left < kDotChunk ? left : kDotChunk) → kDotChunk»", BEYOND
    ),
    "tail of the products forgotten": Mistake("i = done + tid(); «i < end → i < done»", WRONG),
    "a step of the tree short": Mistake("width = «kThreads / 2 → kThreads / 4»;", WRONG),
    "the tree without a barrier": Mistake(
        "ld(sums, tid() + width));\n    «block_sync(); → ;»", r"race at ([\w.]+):(\d+)", ("sums",)
    ),
    "the tree before its leaves": Mistake(
        "st(sums, tid(), value);\n  «block_sync(); → ;»", r"(?:race|uninitialised) at ([\w.]+):(\d+)", ("sums",)
    ),
    # --- packed Deltas
    "more bits than values": Mistake("there && «found < most → true» ?", BEYOND),
    "values counted from the tile's first": Mistake("«rank += all; → ;»", WRONG),
    "a chunk counted with those before it": Mistake("«i < bid_x() → i <= bid_x()»;", f"{BEYOND}|{WRONG}"),
    "the chunks before this one forgotten": Mistake("rank += «args.counts[i] → 0»;", WRONG),
    "half of a word counted": Mistake("popcount(static_cast<uint32_t>(«word >> 32 → word»))", WRONG),
    "a lane counted with those before it": Mistake("«1u << lane() → 2u << lane()») - 1", WRONG),
    "counts of more than seven": Mistake("bit < «4 → 3»; ++bit", WRONG),
    "the counts of warps read too early": Mistake(
        "st(sums, warp(), of_warp);\n  «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld(sums", "st(sums"),
    ),
    "the counts of two tiles in one place": Mistake(
        "«others = sums, sums = next; → ;»", r"race at ([\w.]+):(\d+)", ("ld(sums", "st(sums")
    ),
    "one scale for all groups": Mistake("scale_of(delta, «at → 0»)", WRONG),
    "one scale for two rows": Mistake("if («left == 0 → false» && k < count)", WRONG),
    "a scale behind the last row": Mistake("if (left == 0 && «k < count → true»)", BEYOND),
    "codes read as words wherever they begin": Mistake(
        "«(reinterpret_cast<uintptr_t>(args.delta.codes) & 7) == 0 → true»;", "runtime error: .*misaligned"
    ),
    "codes of a closed Delta": Mistake(
        "«is_open(args.gate) → true»;\n  const int64_t numel = args.delta.numel(), step", BEYOND
    ),
    "bits of a closed Delta": Mistake("«!is_open(args.gate) → false») return;", BEYOND),
    "weights behind the last": Mistake("args.weight && «k < eight.count → k <= eight.count»", BEYOND),
    "elements of W_t behind the last": Mistake("if («k < eight.count → k <= eight.count») store_one", BEYOND),
    # --- the depthwise convolution
    "taps read too early": Mistake(
        "make_weight(p);\n    «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld16(taps", "st(taps"),
    ),
    "an open Delta not in the taps": Mistake("if («open → false») value +=", WRONG),
    "a closed Delta in the taps": Mistake(
        "bool open = «is_open(p.gate) → true»;\n    const int channels", f"{WRONG}|SEGV|null pointer"
    ),
    "Delta's channels as far apart as the kernel is large": Mistake(
        "(first + channel) * «p.delta.ld → p.inputs» + tap", f"{WRONG}|{BEYOND}"
    ),
    "taps of a channel behind the last": Mistake("if («first + channel < p.outputs → true»)", BEYOND),
    "bias of a channel behind the last": Mistake("p.bias && «first + i < p.outputs → true»", BEYOND),
    "the bias of its neighbour": Mistake("(p.bias)[first + «i → (i ^ 1)»]", f"{WRONG}|{BEYOND}"),
    "vectors of channels that fill none": Mistake(
        "if («p.outputs % kVector == 0 → true» && aligned(p.x.data)",
        r"misaligned at|heap-buffer-overflow|unknown-crash",
    ),
    "vectors of pixels off 16 bytes": Mistake(
        "kVector == 0 && «aligned(from) && aligned(to) → true») {", r"misaligned at ([\w.]+):(\d+)", ("gld16", "gst16")
    ),
    "a channel too many": Mistake("if («i < left → i <= left») v.word", BEYOND),
    "a channel of the result too many": Mistake("if («i < left → i <= left») to[i]", f"{BEYOND}|{WRONG}"),
    "channels exchanged": Mistake("v.word[i / 2] >> 16 * («i → (i + 1)» % 2)", WRONG),
    "strips of every split from the first": Mistake("begin = static_cast<int>(«bid_y() → 0u») * count", WRONG),
    "strips behind the last": Mistake("end = «all - begin < count → false» ? all", f"{BEYOND}|{WRONG}"),
    "a strip behind its row": Mistake("if («column >= of_row → column > of_row»)", f"{BEYOND}|{WRONG}"),
    "a row behind its image": Mistake("if («row >= rows → row > rows»)", f"{BEYOND}|{WRONG}"),
    "rows forgotten on the way": Mistake("row += «rows_on → 0», image", WRONG),
    "images forgotten on the way": Mistake("image += «images_on → 0»;", WRONG),
    "a row of the kernel beside": Mistake(
        "ld16(taps, static_cast<unsigned>((«r → (K - 1 - r)» * K + s) * kGroup))", WRONG
    ),
    "rows between two of the stride": Mistake("if («row * p.stride[0] != under → false») continue;", WRONG),
    "a row above the image": Mistake("if («row < 0 → row < -1» || row >= from_size[0])", f"{BEYOND}|{WRONG}"),
    "a row below the image": Mistake("row < 0 || «row >= from_size[0] → row > from_size[0]»", f"{BEYOND}|{WRONG}"),
    "a pixel before the row": Mistake("if («at >= 0 → at >= -1» && at < size)", f"{BEYOND}|{WRONG}"),
    "a pixel behind the row": Mistake("if (at >= 0 && «at < size → at <= size») v", f"{BEYOND}|{WRONG}"),
    "a result before its row": Mistake("if («at >= 0 → true» && at < to_size[1])", f"{BEYOND}|{WRONG}"),
    "a result behind its row": Mistake("at >= 0 && «at < to_size[1] → at <= to_size[1]»", f"{BEYOND}|{WRONG}"),
    "the padding of columns for rows": Mistake(
        "strip.row * p.stride[0] - «p.padding[0] → p.stride[1]» + r;\n      if (row", WRONG
    ),
    "a row of x too many": Mistake("if (row < 0 || «row >= p.size[0] → row > p.size[0]»)", f"{BEYOND}|{WRONG}"),
    "a pixel of dy too many": Mistake("if («at < p.result_size[1] → at <= p.result_size[1]») dy", f"{BEYOND}|{WRONG}"),
    "a pixel of x too many": Mistake("if (at >= 0 && «at < p.size[1] → at <= p.size[1]») v", f"{BEYOND}|{WRONG}"),
    "sums of a column over those before": Mistake(
        "if (s > 0) «block_sync(); → ;»", r"race at ([\w.]+):(\d+)", ("st(sums", "ld(sums")
    ),
    "sums of a column read too early": Mistake(
        "tid(), sum[s][i]);\n      «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("st(sums", "ld(sums"),
    ),
    "the last threads forgotten": Mistake("lane = 0; «lane < lanes → lane + 1 < lanes»; ++lane) total", WRONG),
    "G of a channel behind the last": Mistake("if («channel < p.outputs → true») partial", f"{BEYOND}|{WRONG}"),
    "one row of the kernel for all": Mistake("«of / vectors → 0» * K + s] = total", f"{BEYOND}|{WRONG}"),
    "splits beyond the threads forgotten": Mistake(
        "static_cast<int>(first); «split < p.splits → split < static_cast<int>(kLanes)»;", f"{WRONG}|{BEYOND}"
    ),
    "an element of G behind the last": Mistake("if («at < count → true») {\n#pragma", BEYOND),
    "partial sums read too early": Mistake(
        "st(sums, tid(), sum);\n  «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("st(sums", "ld(sums"),
    ),
    "products read too early": Mistake(
        "st(dots, element, dot);\n  }\n  «block_sync(); → ;»",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("st(dots", "ld(dots"),
    ),
    "closed, but G leaves": Mistake("scaled = «is_open(p.gate) → true» ?", WRONG),
    "scale of G forgotten": Mistake("? «static_cast<float>(p.scale) * g → g» : 0.0f;", WRONG),
    "Delta's gradient as far apart as the kernel is large": Mistake(
        "channel * «p.ld_result → p.inputs» + tap", f"{WRONG}|{BEYOND}"
    ),
}
NUMBER = {name: number for number, name in enumerate(MISTAKES, 1)}


class Edit(NamedTuple):
    """From `begin` to `end` of a header, `old` may become `new`."""

    file: str
    begin: int
    end: int
    old: str
    new: str


@cache
def edits(name: str) -> list[Edit]:
    """Where a mistake stands: each of its places is found once."""
    found = []
    places = MISTAKES[name].places
    for place in (places,) if isinstance(places, str) else places:
        text = PART.sub(r"\1", place)
        files = [file for file, source in SOURCES.items() for _ in range(source.count(text))]
        assert len(files) == 1, f"{name}: expected {text!r} once, found it in {files}"
        begin, at = SOURCES[files[0]].index(text), 0
        for part in PART.finditer(place):
            begin += part.start() - at
            old, new = part.groups()
            assert "\n" not in old + new, f"{name}: {old!r} and {new!r} are to be on one line"
            found.append(Edit(files[0], begin, begin + len(old), old, new))
            begin, at = begin + len(old), part.end()
    return found


# The cases of planted.cpp that a header's mistakes are likely found by, which run first.
LIKELY = {
    "pixels.cuh": "convolution",
    "mixed.cuh": "mixed",
    "conv2d.cuh": "convolution",
    "elements.cuh": "elementwise",
    "reconstruct.cuh": "elementwise",
    "foreach.cuh": "elementwise",
    "settle.cuh": "elementwise",
    "gate.cuh": "elementwise",
    "dot.cuh": "products",
    "block.cuh": "products",
    "unpack.cuh": "packed",
    "depthwise.cuh": "depthwise",
}


def first(name: str | None) -> str:
    """The beginning of their names; "" where there is nothing to say."""
    return "" if name is None else LIKELY.get(edits(name)[0].file, "")


def rewritten(changes: list[tuple[Edit, str]]) -> dict[str, str]:
    """The headers with these texts instead."""
    result = dict(SOURCES)
    for edit, text in sorted(changes, reverse=True):  # from the end, so that places stay where they are
        source = result[edit.file]
        assert source[edit.begin : edit.end] == edit.old, f"{edit.old!r} overlaps another place"
        result[edit.file] = source[: edit.begin] + text + source[edit.end :]
    return result


def planted(name: str) -> dict[str, str]:
    """The headers with one mistake in them."""
    return rewritten([(edit, edit.new) for edit in edits(name)])


def all_planted() -> dict[str, str]:
    """The headers with every mistake to choose from, but those of constants."""
    choices: dict[Edit, list[tuple[int, str]]] = {}  # of the same place
    for name, mistake in MISTAKES.items():
        for edit in [] if mistake.constant else edits(name):
            choices.setdefault(edit._replace(new=""), []).append((NUMBER[name], edit.new))
    return rewritten([(edit, chosen(edit.old, among)) for edit, among in choices.items()])


def chosen(old: str, among: list[tuple[int, str]]) -> str:
    if old.endswith(";"):
        return "".join(f"if (taps_planted == {n}) {{ {new} }} else " for n, new in among) + f"{{ {old} }}"
    return "(" + "".join(f"taps_planted == {n} ? ({new}) : " for n, new in among) + f"({old}))"
