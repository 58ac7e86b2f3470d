"""Mistakes planted in the tile loop, one at a time: each is found on the CPU, most with the line that shows it.

The loop's source is changed as text, and a small program is compiled against it with AddressSanitizer.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from test_host_twin import COMPILER, FLAGS, HERE, RUNTIME, compile_objects

CSRC = HERE.parents[1] / "csrc"
TILE = (CSRC / "cuda/tile.cuh").read_text(encoding="utf-8")
WAIT, SYNC, LOAD = "cp_wait<kStages - 2>();\n", "block_sync();  //", "load(step + kStages - 1);\n"


class Plant(NamedTuple):
    """`old` becomes `new`; the program then says `said`, and where it names a line, that line holds one of `shows`."""

    old: str
    new: str
    said: str
    shows: tuple[str, ...] = ()


READS = ("ldsm_x4", "ld(weight", "ld(delta")
PLANTED = {
    "no barrier": Plant(SYNC, "//", r"race at line (\d+)", READS),
    "wait for too few": Plant("cp_wait<kStages - 2>()", "cp_wait<kStages - 1>()", r"pending copy at line (\d+)", READS),
    "barrier before the wait": Plant(WAIT, "block_sync();\n", r"(?:pending copy|race) at line (\d+)", READS),
    "fetched before the barrier": Plant(WAIT, WAIT + LOAD, r"race at line (\d+)", ("cp_async16", "st(tile", *READS)),
    "stage used too early": Plant(LOAD, "load(step + kStages);\n", r"(?:race|pending copy) at line (\d+)", READS),
    "rows of x, one too many": Plant("args.ldx, row, args.m,", "args.ldx, row, args.m + 1,", "heap-buffer-overflow"),
    "rows of the weight, one too many": Plant(
        "args.ldw, column, args.n,", "args.ldw, column, args.n + 1,", "heap-buffer-overflow"
    ),
    "rows of Delta, one too many": Plant(
        "args.ldd, column, args.n,", "args.ldd, column, args.n + 1,", "heap-buffer-overflow"
    ),
    "depth, one too many": Plant("? column_end - c", "? column_end + 1 - c", "heap-buffer-overflow|expected"),
    "rows of y, one too many": Plant("r >= args.m", "r > args.m", "heap-buffer-overflow"),
    "columns of y, one too many": Plant("c >= args.n", "c > args.n", "heap-buffer-overflow|expected"),
    "half a fragment beside": Plant("pair(w, d, at + 8, open)", "pair(w, d, at + 4, open)", "expected .*, got"),
    "wrong rows for ldmatrix": Plant("lane() % 16) * kStride", "lane() % 8) * kStride", "expected .*, got"),
    "rows off 16 bytes": Plant("kDepth + 8;", "kDepth + 4;", r"misaligned at line (\d+)", ("cp_async16", "ldsm_x4")),
    "closed, but Delta is read": Plant("if (open) fetch<D", "if (true) fetch<D", "SEGV|null pointer"),
    "gate forgotten": Plant("if (!open) return", "if (open) return", "expected .*, got|uninitialised"),
    "splits begin at zero": Plant("bid_z() * args.k_per_split;", "0 * args.k_per_split;", "expected .*, got"),
}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> list[Path]:
    return compile_objects(tmp_path_factory.mktemp("runtime"), "sanitized", RUNTIME)


def run(folder: Path, runtime: list[Path], source: str) -> subprocess.CompletedProcess[str]:
    """Compile and run the small program against a changed tile.cuh."""
    (folder / "cuda").mkdir()
    (folder / "cuda/tile.cuh").write_text(source, encoding="utf-8")
    command = [COMPILER, "-std=c++17", f"-I{folder}", f"-I{HERE}", f"-I{CSRC}", *FLAGS["sanitized"]]
    objects = [*map(str, runtime), str(HERE / "planted.cpp"), "-o", str(folder / "planted")]
    done = subprocess.run([*map(str, command), *objects], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return subprocess.run([str(folder / "planted")], capture_output=True, text=True, timeout=300)


def test_nothing_planted(tmp_path, runtime) -> None:
    done = run(tmp_path, runtime, TILE)
    assert done.returncode == 0 and " 0 failed" in done.stdout, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str, tmp_path, runtime) -> None:
    plant = PLANTED[name]
    assert TILE.count(plant.old) == 1, f"{plant.old!r} is in tile.cuh {TILE.count(plant.old)} times"
    source = TILE.replace(plant.old, plant.new)
    if name == "barrier before the wait":  # the two change places
        source = source.replace(SYNC, WAIT + "//")
    if name == "fetched before the barrier":
        first = source.index(LOAD)
        source = source[: first + len(LOAD)] + source[first + len(LOAD) :].replace(LOAD, "", 1)
    done = run(tmp_path, runtime, source)
    text = done.stdout + done.stderr
    found = re.search(plant.said, text)
    assert done.returncode != 0 and found, text[-3000:]
    if plant.shows:
        lines = source.splitlines()
        named = [lines[int(number) - 1] for number in re.findall(plant.said, text)]
        assert any(piece in line for line in named for piece in plant.shows), (named, text[-2000:])
