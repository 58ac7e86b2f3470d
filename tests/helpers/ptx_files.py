"""What tests of PTX begin with: nvcc's text of a file of kernels, the layout of arguments, numbers of every type."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ptx
import pytest
from host_build import CSRC, HOST, compiled, run
from stages import made_once
from torch.utils.cpp_extension import include_paths

T = TypeVar("T")

NVCC = shutil.which("nvcc")
MISSING = [name for name in ("nvcc", "c++filt") if shutil.which(name) is None]
needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not found, and so no PTX to run")
CODES = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3}  # Dtype
HELD = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16": np.uint16}


def text_of(factory: pytest.TempPathFactory, name: str, architecture: str) -> str:
    """csrc/cuda/NAME.cu as PTX."""

    def make(folder: Path) -> None:
        includes = [f"-I{path}" for path in (CSRC, CSRC / "cuda", *include_paths())]
        options = ["-ptx", "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}", *includes]
        source = CSRC / f"cuda/{name}.cu"
        subprocess.run([str(NVCC), *options, str(source), "-o", str(folder / "text")], check=True, timeout=600)

    return (made_once(factory, f"ptx-{name}-{architecture}", make) / "text").read_text(encoding="utf-8")


class Texts(dict[str, T]):
    """What is made for an architecture, once it is asked for."""

    def __init__(self, make: Callable[[str], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, architecture: str) -> T:
        self[architecture] = self._make(architecture)
        return self[architecture]


def demangled(kernels: Mapping[str, T]) -> dict[str, T]:
    """The same by the names that C++ gave them."""
    said = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    return dict(zip(said.splitlines(), kernels.values(), strict=True))


def layout_of(factory: pytest.TempPathFactory) -> dict[str, int]:
    """Where the fields of the arguments are: "LinearProduct.rows" -> bytes; "LinearProduct" -> its size."""

    def make(folder: Path) -> None:
        compiled("-std=c++17", "-Wno-invalid-offsetof", f"-I{CSRC}", HOST / "layout.cpp", "-o", folder / "layout")
        (folder / "layout.txt").write_text(run(folder / "layout"), encoding="utf-8")

    lines = (made_once(factory, "layout", make) / "layout.txt").read_text(encoding="utf-8").splitlines()
    return {name: int(at) for name, at in (line.split() for line in lines)}


class Arguments:
    """The bytes of a struct of csrc/kernels.h, all zero at first."""

    def __init__(self, layout: Mapping[str, int], name: str) -> None:
        self.layout, self.name, self.bytes = layout, name, bytearray(layout[name])

    def set(self, field: str, form: str, *values: Any) -> None:
        struct.pack_into("<" + form, self.bytes, self.layout[f"{self.name}.{field}"], *values)


def stored(values: Any, kind: str) -> Any:
    """Numbers as a type holds them, rounded to the nearest from fp32 (fp64 from itself)."""
    if kind == "f64":
        return np.asarray(values, np.float64)
    short = {"bf16": ptx.float_to_bf16, "f16": ptx.float_to_f16, "f32": lambda x: x}[kind]
    return short(np.asarray(values, np.float32))


def number(held: Any, kind: str) -> Any:
    """What they are, in fp64."""
    if kind == "bf16":
        return ptx.bf16_to_float(held).astype(np.float64)
    return (held.view(np.float16) if kind == "f16" else held).astype(np.float64)
