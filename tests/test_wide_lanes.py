"""The CPU's fused products and their packing with sixteen lanes, bf16 in pairs or not, as on AVX-512: sanitized."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_host_twin import COMPILER, FLAGS, HERE

CSRC = HERE.parents[1] / "csrc"
WIDE = ["-DTAPS_LANES=16", "-DTAPS_ISA=wide", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno"]


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize(
    ("stem", "kernels", "problems"), [("products", ("tiles", "few_rows"), 96), ("packs", ("packs",), 4000)]
)
def test_sixteen_lanes(tmp_path: Path, pairs: int, stem: str, kernels: tuple[str, ...], problems: int) -> None:
    assert COMPILER, "expected a C++ compiler (CXX, g++ or c++): building the package needs one too"
    binary = tmp_path / stem
    sources = [HERE / f"{stem}.cpp", *(CSRC / "cpu" / f"{kernel}.cpp" for kernel in kernels)]
    options = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{CSRC}",
        *FLAGS["sanitized"],
        *WIDE,
        f"-DTAPS_PAIRS={pairs}",
    ]
    built = subprocess.run(
        [COMPILER, *options, *map(str, sources), "-o", str(binary)], capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0, built.stderr[-4000:]
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and f"{problems} problems" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
