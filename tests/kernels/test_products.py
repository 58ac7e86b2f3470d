"""The CPU's fused products and their packing, with lanes and pairs that this machine may not have: sanitized.

`make kernels` runs the products of one instruction set, drawn; `make sanitize` those of the others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host_build import CPU, CSRC, FLAGS, HOST, STANDARD, compiled, run
from stages import drawn

MACHINE = ("-DTAPS_ISA=wide", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno")
# Floats in a vector, and whether pairs are multiplied: SSE, AVX2, AVX-512, AVX-512 with bf16, and what no machine has.
SETS = [(lanes, pairs) for lanes in (4, 8, 16) for pairs in (0, 1)]
(ONE,) = drawn("instruction set", SETS, 1)


def checked(folder: Path, stem: str, kernels: tuple[str, ...], lanes: int, pairs: int, *more: str) -> str:
    """What the program prints, built of `tests/kernels/host/<stem>.cpp` and of these files of the CPU's kernels."""
    options = [*STANDARD, f"-I{CSRC}", *FLAGS["sanitized"], *MACHINE, f"-DTAPS_LANES={lanes}", f"-DTAPS_PAIRS={pairs}"]
    sources = [HOST / f"{stem}.cpp", *(CPU / f"{kernel}.cpp" for kernel in kernels)]
    compiled(*options, *more, *sources, "-o", folder / stem)
    return run(folder / stem)


@pytest.mark.parametrize(
    "lanes, pairs", [pytest.param(*s, marks=pytest.mark.thorough if s == ONE else pytest.mark.sanitize) for s in SETS]
)
def test_products(tmp_path: Path, lanes: int, pairs: int, record_property) -> None:
    """Problems on both sides of what a panel keeps of x, so that some have several panels take turns."""
    if (lanes, pairs) == ONE:
        record_property("drawn", f"products of {lanes} lanes{' and pairs' if pairs else ''}")
    assert "96 problems" in checked(tmp_path, "products", ("tiles", "few_rows"), lanes, pairs, "-DTAPS_KEPT=8192")


@pytest.mark.thorough
@pytest.mark.parametrize("lanes, pairs", SETS)
def test_packing(tmp_path: Path, lanes: int, pairs: int) -> None:
    assert "4000 problems" in checked(tmp_path, "packs", ("packs",), lanes, pairs)
