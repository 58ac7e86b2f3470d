"""Where the kernels and the twin's sources are, and how a test compiles them with the host's compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from stages import made_once

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests/kernels/host"  # the twin, and the programs that run on it
CSRC = ROOT / "csrc"  # what `#include "cuda/..."` and `#include "cpu/..."` begin in
CUDA = CSRC / "cuda"
CPU = CSRC / "cpu"
# The headers of the device's kernels, in which mistakes are planted.
KERNEL_HEADERS = (
    "stream.cuh",
    "operands.cuh",
    "tile.cuh",
    "linear.cuh",
    "mixed.cuh",
    "rows.cuh",
    "pixels.cuh",
    "conv2d.cuh",
    "elements.cuh",
    "block.cuh",
    "reconstruct.cuh",
    "unpack.cuh",
    "depthwise.cuh",
    "dot.cuh",
    "foreach.cuh",
    "settle.cuh",
    "gate.cuh",
)

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
STANDARD = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = {"plain": ("-O2",), "sanitized": ("-O1", "-g", *SANITIZERS)}
RUNTIME = ("fiber", "twin", "primitives")  # the twin itself


def compiled(*arguments: object) -> None:
    """Run the compiler; what it complains of is the failure's text."""
    assert COMPILER, "expected a C++ compiler (CXX, g++ or c++): building the package needs one too"
    done = subprocess.run([COMPILER, *map(str, arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_objects(folder: Path, kind: str, names: Sequence[str]) -> list[Path]:
    """Object files of the twin's own sources, plain or sanitized."""
    objects = [folder / f"{name}.o" for name in names]
    for name, to in zip(names, objects, strict=True):
        compiled(*STANDARD, f"-I{HOST}", f"-I{CSRC}", *FLAGS[kind], "-c", HOST / f"{name}.cpp", "-o", to)
    return objects


def run(*command: object, timeout: float = 600) -> str:
    """What a program prints; any exit but 0 fails with its last words."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def twin_runtime(factory: pytest.TempPathFactory, kind: str) -> list[Path]:
    """The twin's own object files, compiled once for all tests."""
    folder = made_once(factory, f"twin-{kind}", lambda part: compile_objects(part, kind, RUNTIME))
    return [folder / f"{name}.o" for name in RUNTIME]
