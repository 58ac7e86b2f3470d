"""Mistakes planted in the kernels, one at a time: each is found on the CPU, most with the line that shows it.

Their source is changed as text, and a small program is compiled against it with AddressSanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from host_build import COMPILER, CSRC, CUDA, HOST, KERNEL_HEADERS, SANITIZERS, twin_runtime
from stages import THOROUGH, drawn

SOURCES = {name: (CUDA / name).read_text(encoding="utf-8") for name in KERNEL_HEADERS}
QUICK = ["-O0", *SANITIZERS]  # compiling takes longer than running
WAIT, SYNC, LOAD = "cp_wait<kStages - 2>();\n", "block_sync();  // what", "load(step + kStages - 1, next);\n"
WRONG, BEYOND = "expected .*, got", "heap-buffer-overflow"


class Plant(NamedTuple):
    """`old` becomes `new`; the program then says `said`, and a line it names holds one of `shows`."""

    old: str
    new: str
    said: str
    shows: tuple[str, ...] = ()


READS = ("ldsm_x4", "ld(w", "ld(d", "ld2(w", "ld2(d")
PLANTED = {
    "no barrier": Plant(SYNC, "// what", r"race at ([\w.]+):(\d+)", READS),
    "wait for too few": Plant(
        "cp_wait<kStages - 2>()", "cp_wait<kStages - 1>()", r"pending copy at ([\w.]+):(\d+)", READS
    ),
    "barrier before the wait": Plant(WAIT, "block_sync();\n", r"(?:pending copy|race) at ([\w.]+):(\d+)", READS),
    "fetched before the barrier": Plant(WAIT, WAIT + LOAD, r"race at ([\w.]+):(\d+)", ("cp_async<", "st(tile", *READS)),
    "stage used too early": Plant(
        "int now = 0, next = kStages - 1;", "int now = 0, next = 0;", r"(?:race|pending copy) at ([\w.]+):(\d+)", READS
    ),
    "rows, one too many": Plant("r < rows && count", "r <= rows && count", BEYOND),
    "columns, one too many": Plant(
        "(kTurned ? left_ : depth) - column", "(kTurned ? left_ : depth) + 1 - column", f"{BEYOND}|{WRONG}"
    ),
    "rows of whole stages, one too many": Plant("kTurned || r < left_", "kTurned || r <= left_", BEYOND),
    "columns of whole stages, one too many": Plant(
        "Mine::count(left_ - column)", "Mine::count(left_ + 1 - column)", f"{BEYOND}|{WRONG}"
    ),
    "a short stage taken for a whole one": Plant(
        "piece_ == 16 && depth == kDepth", "piece_ == 16", f"{BEYOND}|{WRONG}"
    ),
    "a stage skipped": Plant(
        "next_ += kTurned ? kDepth * ld_ : kDepth;",
        "next_ += kTurned ? kDepth * ld_ : kDepth + 8;",
        f"{BEYOND}|{WRONG}",
    ),
    "rows of x, one too many": Plant("p.x, place.row, p.rows)", "p.x, place.row, p.rows + 1)", BEYOND),
    "rows of the weight, one too many": Plant("place.column, columns)", "place.column, columns + 1)", BEYOND),
    "depth of the input gradient, one too many": Plant(
        "kBackward ? p.outputs : p.inputs;", "kBackward ? p.outputs + 1 : p.inputs;", BEYOND
    ),
    "rows of the weight gradient's depth, one too many": Plant("0, p.rows)", "0, p.rows + 1)", BEYOND),
    "rows of the result, one too many": Plant("if (r >= rows)", "if (r > rows)", BEYOND),
    "columns of the result, one too many": Plant("if (c + e >= columns)", "if (c + e > columns)", f"{BEYOND}|{WRONG}"),
    "rows of Delta's gradient, one too many": Plant(
        "if (r < p.outputs && c < p.inputs) to[0]", "if (r <= p.outputs && c < p.inputs) to[0]", BEYOND
    ),
    "columns of Delta's gradient, one too many": Plant(
        "if (r < p.outputs && c + 1 < p.inputs) to[1]", "if (r < p.outputs && c < p.inputs) to[1]", f"{BEYOND}|{WRONG}"
    ),
    "columns of Delta, one too many": Plant(
        "if (r < p.outputs && c + 1 < p.inputs) change",
        "if (r < p.outputs && c < p.inputs) change",
        f"{BEYOND}|{WRONG}",
    ),
    "a tile at the edge taken for a whole one": Plant(
        "place.row + S::kRows <= p.outputs", "place.row < p.outputs", BEYOND
    ),
    "half a fragment beside": Plant("inner + kHalf", "inner + kHalf / 2", WRONG),
    "wrong rows for ldmatrix": Plant("first + lane() % 16) * kStride", "first + lane() % 8) * kStride", WRONG),
    "turned halves exchanged": Plant(
        "lane() / 16 * 8 + lane() % 8) * kStride + first + lane() / 8 % 2 * 8",
        "lane() / 8 % 2 * 8 + lane() % 8) * kStride + first + lane() / 16 * 8",
        WRONG,
    ),
    "columns exchanged": Plant(
        "b[j][1] = both[1], b[j + 1][0] = both[2]", "b[j][1] = both[2], b[j + 1][0] = both[1]", WRONG
    ),
    "neighbours along the wrong side": Plant("ld(d, at_d + kStrideD)", "ld(d, at_d + 1)", WRONG),
    "rows off 16 bytes": Plant(
        "(sizeof(T) == 2 ? 8 : 4))",
        "(sizeof(T) == 2 ? 4 : 4))",
        r"misaligned at ([\w.]+):(\d+)",
        ("cp_async<", "ldsm_x4"),
    ),
    "closed, but Delta is read": Plant("if (open) delta.fetch", "if (true) delta.fetch", "SEGV|null pointer"),
    "gate forgotten": Plant("if (!open) {", "if (open) {", f"{WRONG}|uninitialised"),
    "splits begin at zero": Plant("begin = bid_y() * p.depth_of_split", "begin = 0 * p.depth_of_split", WRONG),
    "bias added by every split": Plant("if (p.splits > 1) {", "if (p.splits > 2) {", WRONG),
    "slices written over a stage": Plant(
        "block_sync();  // the stages, or", "// the stages, or", r"race at ([\w.]+):(\d+)", ("st(sums", *READS)
    ),
    "slices read too early": Plant(
        "        });\n      }\n      block_sync();\n      if (S::slice() == 0)",
        "        });\n      }\n      if (S::slice() == 0)",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld(sums", "st(sums"),
    ),
    "both slices take the same depth": Plant("S::slice() * kPart + within", "0 * kPart + within", WRONG),
    "sums written over a stage": Plant(
        "    block_sync();  // the stages have been read\n", "", r"race at ([\w.]+):(\d+)", ("st(sums", "ldsm_x4")
    ),
    "sums read too early": Plant(
        "st(sums, warp(), dot);\n    block_sync();",
        "st(sums, warp(), dot);",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("ld(sums", "st(sums"),
    ),
    "a lane short": Plant("mask = 16;", "mask = 8;", WRONG),
    "closed, but its gradient leaves": Plant("open ? scale * first", "true ? scale * first", WRONG),
    "scale forgotten": Plant("open ? scale * second", "open ? second", WRONG),
    "pairs of rows that cannot be read in them": Plant(
        "View<D>(p.delta).even() && ", "", "runtime error: .*misaligned"
    ),
    "pairs from an odd element": Plant(
        "(reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(ld) * sizeof(E)) % (2 * sizeof(E)) == 0",
        "(static_cast<uintptr_t>(ld) * sizeof(E)) % (2 * sizeof(E)) == 0",
        "runtime error: .*misaligned",
    ),
    "<G, Delta> in fp32": Plant(
        "static_cast<double>(first) * to_f32(change[at].x)", "first * to_f32(change[at].x)", "expected|FAILED"
    ),
    "splits added from the last": Plant("partial[split * rows", "partial[(p.splits - 1 - split) * rows", WRONG),
    "the threshold not in the score's precision": Plant("static_cast<float>(gate.threshold)", "gate.threshold", WRONG),
    "closed at the threshold": Plant("gate.score) >= gate.threshold", "gate.score) > gate.threshold", WRONG),
    "NaN opens": Plant(
        "*static_cast<const float*>(gate.score) >= static_cast<float>(gate.threshold)",
        "!(*static_cast<const float*>(gate.score) < static_cast<float>(gate.threshold))",
        WRONG,
    ),
    # W_t as a tensor, and the dot product
    "a vector too many": Plant("vectors ? count / kVector : 0", "vectors ? (count + 7) / kVector : 0", BEYOND),
    "an element too many": Plant("i < count; i += step", "i <= count; i += step", BEYOND),
    "an element too few": Plant("i < count; i += step", "i < count - 1; i += step", WRONG),
    "vectors where rows are misaligned": Plant(
        "reinterpret_cast<uintptr_t>(data) % 16 == 0", "true", r"misaligned at ([\w.]+):(\d+)", ("gld16_once", "gst16")
    ),
    "an open Delta is not added": Plant("(open ? weight + delta : weight)", "weight", WRONG),
    "a closed Delta is taken alone": Plant(
        "bool open = args.delta && is_open(args.gate);\n  const int64_t count",
        "bool open = args.delta;\n  const int64_t count",
        WRONG,
    ),
    "scale of a rebuild forgotten": Plant("scale == T(1) ? sum : sum * scale", "sum", WRONG),
    "halves of a word exchanged": Plant("(i % 2 * 16)", "((i + 1) % 2 * 16)", WRONG),
    "words of a double exchanged": Plant("{{low_of(first), high_of(first),", "{{high_of(first), low_of(first),", WRONG),
    "the next tensor's block": Plant("block < args.end[middle]", "block <= args.end[middle]", f"{WRONG}|{BEYOND}"),
    "a tensor's first chunk": Plant("item > 0 ? args.end[item - 1] : 0", "0", f"{WRONG}|{BEYOND}"),
    "a chunk beyond its tensor": Plant("left < kForeachChunk ? left : kForeachChunk", "kForeachChunk", BEYOND),
    "the innermost size for all": Plant(
        "index /= walk.sizes[dim]", "index /= walk.sizes[walk.ndim - 1]", f"{WRONG}|{BEYOND}"
    ),
    "no weight, but it is read": Plant(
        "const T weight = args.weight ? load_one<T>(args.weight, args.weight_dtype, at[1]) : T(0)",
        "const T weight = load_one<T>(args.weight, args.weight_dtype, at[1])",
        "SEGV|null pointer",
    ),
    "sums of more chunks than threads": Plant(
        "for (int64_t i = tid(); i < count; i += nthreads()) sum",
        "for (int64_t i = tid(); i < nthreads(); i += nthreads()) sum",
        WRONG,
    ),
    "rows of a chunk beyond the end": Plant(
        "begin + (left < per_chunk ? left : per_chunk)", "begin + per_chunk", f"{BEYOND}|{WRONG}"
    ),
    "scale of a rebuild in fp32": Plant("static_cast<T>(args.scale);", "static_cast<float>(args.scale);", WRONG),
    "another operand's strides": Plant(
        "position * walk.strides[k][dim]", "position * walk.strides[0][dim]", f"{WRONG}|{BEYOND}"
    ),
    "products of a chunk beyond the end": Plant(
        "begin + (left < kDotChunk ? left : kDotChunk)", "begin + kDotChunk", BEYOND
    ),
    "tail of the products forgotten": Plant("i = done + tid(); i < end", "i = done + tid(); i < done", WRONG),
    "a step of the tree short": Plant("width = kThreads / 2;", "width = kThreads / 4;", WRONG),
    "the tree without a barrier": Plant(
        "ld(sums, tid() + width));\n    block_sync();",
        "ld(sums, tid() + width));",
        r"race at ([\w.]+):(\d+)",
        ("sums",),
    ),
    "the tree before its leaves": Plant(
        "st(sums, tid(), value);\n  block_sync();",
        "st(sums, tid(), value);",
        r"(?:race|uninitialised) at ([\w.]+):(\d+)",
        ("sums",),
    ),
}


SAMPLE = drawn("planted mistakes", [*PLANTED], 4)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> list[Path]:
    return twin_runtime(tmp_path_factory, "sanitized")


def run(folder: Path, runtime: list[Path], changed: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Compile and run the small program against the sources, some of them changed."""
    (folder / "cuda").mkdir()
    for name, source in {**SOURCES, **changed}.items():
        (folder / "cuda" / name).write_text(source, encoding="utf-8")
    command = [COMPILER, "-std=c++17", f"-I{folder}", f"-I{HOST}", f"-I{CSRC}", *QUICK]
    objects = [*map(str, runtime), str(HOST / "planted.cpp"), "-o", str(folder / "planted")]
    done = subprocess.run([*map(str, command), *objects], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return subprocess.run([str(folder / "planted")], capture_output=True, text=True, timeout=300)


def planted(name: str) -> dict[str, str]:
    """The source with the mistake in it."""
    plant = PLANTED[name]
    found = [file for file, text in SOURCES.items() for _ in range(text.count(plant.old))]
    assert len(found) == 1, f"expected {plant.old!r} once, found it in {found}"
    source = SOURCES[found[0]].replace(plant.old, plant.new)
    if name == "barrier before the wait":  # the two change places
        source = source.replace(SYNC, WAIT + "// what")
    if name == "fetched before the barrier":
        first = source.index(LOAD)
        source = source[: first + len(LOAD)] + source[first + len(LOAD) :].replace(LOAD, "", 1)
    return {found[0]: source}


@pytest.fixture(scope="module")
def outcomes(request, runtime, tmp_path_factory) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The chosen mistakes, compiled and run on all cores."""
    chosen = [item.callspec.params["name"] for item in request.session.items if "outcomes" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = {name: tmp_path_factory.mktemp("planted") for name in chosen}
        yield {name: pool.submit(lambda n=name: run(folders[n], runtime, planted(n))) for name in chosen}


def test_nothing_planted(tmp_path, runtime) -> None:
    done = run(tmp_path, runtime, {})
    assert done.returncode == 0 and " 0 failed" in done.stdout, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.thorough) for name in PLANTED]
)
def test_planted(name: str, outcomes, record_property) -> None:
    if not THOROUGH:
        record_property("drawn", f"planted: {name}")
    plant, done = PLANTED[name], outcomes[name].result()
    text = done.stdout + done.stderr
    found = re.search(plant.said, text)
    assert done.returncode != 0 and found, text[-3000:]
    if plant.shows:
        sources = {**SOURCES, **planted(name)}
        named = [sources[file].splitlines()[int(number) - 1] for file, number in re.findall(plant.said, text)]
        assert any(piece in line for line in named for piece in plant.shows), (named, text[-2000:])
