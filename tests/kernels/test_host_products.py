"""The CPU's fused products and their packing, with lanes and pairs that this machine may not have: sanitized."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_host_twin import COMPILER, FLAGS, HERE

CSRC = HERE.parents[2] / "csrc"
MACHINE = ["-DTAPS_ISA=wide", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno"]


def run(folder: Path, stem: str, kernels: tuple[str, ...], lanes: int, pairs: int, *more: str) -> str:
    assert COMPILER, "expected a C++ compiler (CXX, g++ or c++): building the package needs one too"
    binary = folder / stem
    sources = [HERE / f"{stem}.cpp", *(CSRC / "cpu" / f"{kernel}.cpp" for kernel in kernels)]
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", *FLAGS["sanitized"], *MACHINE, *more]
    options += [f"-DTAPS_LANES={lanes}", f"-DTAPS_PAIRS={pairs}"]
    built = subprocess.run(
        [COMPILER, *options, *map(str, sources), "-o", str(binary)], capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0, built.stderr[-4000:]
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("pairs", [0, 1])
def test_products_with_sixteen_lanes(tmp_path: Path, pairs: int) -> None:
    """Problems on both sides of what a panel keeps of x, so that some have several panels take turns."""
    output = run(tmp_path, "products", ("tiles", "few_rows"), 16, pairs, "-DTAPS_KEPT=8192")
    assert "96 problems" in output


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_packing(tmp_path: Path, lanes: int, pairs: int) -> None:
    assert "4000 problems" in run(tmp_path, "packs", ("packs",), lanes, pairs)
