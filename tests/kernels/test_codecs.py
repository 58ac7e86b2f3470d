"""The CPU's loops over packed Deltas and patches in a program of their own, one thread's share after the other's, with
AddressSanitizer and UBSan, under inputs of every kind (host/codecs.cpp).

`make fuzz` runs ten million of each; an input is its seed, so that any that fails can be run again alone.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
from host_build import CPU, CSRC, HOST, SANITIZERS, compiled, run
from stages import SEED, made_once

KERNELS = ("bitmask", "int8", "int4", "sign", "encode", "patch", "few_rows")
INPUTS = int(os.environ.get("TAPS_FUZZ_INPUTS", 50_000))
SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    avx512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512")
    SETS |= {"avx2": ("-mavx2", "-mf16c"), "avx512": avx512}
FLAGS = (
    *(
        "-std=c++17",
        "-O1",
        "-g",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Wno-maybe-uninitialized",
    ),
    *SANITIZERS,
    *(f"-I{CSRC}", "-isystem", Path(torch.__file__).parent / "include", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *(f"-DTAPS_HAVE_{name.upper()}" for name in SETS),
)


def build(folder: Path) -> None:
    objects = []
    for name, flags in SETS.items():
        fma = ("-mfma",) if name == "avx2" else ()
        loops = {"lanes": (), "encoders": (), "few_rows": ("-ffp-contract=fast", "-Wno-psabi", *fma)}
        for loop, more in loops.items():
            objects.append(folder / f"{loop}_{name}.o")
            compiled(*FLAGS, *more, *flags, f"-DTAPS_ISA={name}", "-c", CPU / f"{loop}.cpp", "-o", objects[-1])
    sources = (HOST / "codecs.cpp", *(CPU / f"{name}.cpp" for name in ("unpack", "encode", "few_rows", "patch")))
    compiled(*FLAGS, *sources, *objects, "-o", folder / "codecs")


@pytest.mark.thorough  # with sanitizers these loops take a minute and a half to compile
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_of_every_kind(kernel: str, tmp_path_factory: pytest.TempPathFactory, record_property) -> None:
    program = made_once(tmp_path_factory, "codecs", build) / "codecs"
    seed = int(SEED) * 100 if SEED.isdigit() else 0
    record_property("drawn", f"{kernel} inputs from seed {seed}")
    output = run(program, kernel, INPUTS, seed, timeout=7000)
    assert f"{INPUTS} inputs from seed {seed}" in output and " 0 failed" in output, output
    slowest = float(output.rsplit("the slowest ", 1)[1].split(" ms")[0])
    assert slowest < 100, output
