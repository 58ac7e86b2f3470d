"""Instructions of the products' main loops, counted in what ptxas makes of them (tools/loop_table.py): none grows."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from host_build import CSRC, ROOT
from torch.utils.cpp_extension import include_paths

NVCC = shutil.which("nvcc")
WHEEL = importlib.util.find_spec("nvidia")  # of the package index: nvidia-cuda-nvdisasm
FOLDERS = list(WHEEL.submodule_search_locations or []) if WHEEL else []
FOUND = [path for folder in FOLDERS for path in Path(folder).glob("*/bin/nvdisasm")]
NVDISASM = shutil.which("nvdisasm") or (str(FOUND[0]) if FOUND else None)
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found: there is no machine code to count"),
    pytest.mark.skipif(NVDISASM is None, reason="nvdisasm was not found: pip install nvidia-cuda-nvdisasm"),
]
# (rows of the tile, W, Delta, of the input gradient) -> instructions a warp and step, gate open and closed; then of
# tiles of 128 columns, whose steps are 16 deep where Delta is in fp32.
MOST = {
    (64, "half", "half", False): (71, 55),
    (64, "half", "float", False): (117, 55),
    (64, "float", "float", False): (103, 71),
    (16, "half", "half", False): (69, 56),
    (16, "half", "float", False): (88, 51),
    (16, "float", "float", False): (79, 58),
    (64, "half", "half", True): (77, 58),
    (64, "half", "float", True): (125, 57),
    (64, "float", "float", True): (121, 80),
}
MOST_WIDE = {
    (64, "half", "half"): (92, 75),
    (64, "half", "float"): (95, 57),
    (64, "float", "float"): (86, 66),
    (128, "half", "half"): (123, 104),
    (128, "half", "float"): (103, 68),
    (128, "float", "float"): (100, 79),
}
# Where the splits are the blocks of clusters, which are kernels of their own: those that differ.
MOST_CLUSTERED = {
    (16, "half", "float", False): (93, 49),
    (16, "float", "float", False): (77, 59),
    (64, "half", "float", True): (123, 58),
}
MOST_WIDE_CLUSTERED = {(64, "half", "float"): (97, 57), (128, "float", "float"): (109, 78)}
# The same of a convolution, while its pixels stay under one place of the kernel.
MOST_CONVOLVED = {
    (64, "half", "half"): (92, 68),
    (64, "half", "float"): (141, 68),
    (64, "float", "float"): (115, 82),
    (16, "half", "half"): (83, 71),
    (16, "half", "float"): (108, 71),
    (16, "float", "float"): (92, 63),
}
# Without tensor cores (csrc/cuda/rows.cuh): rows, W, Delta -> instructions a step of 1024 weights of a warp, of 512
# where with an open gate Delta is in fp32, and of 2048 where with a closed one W is in 16 bits.
MOST_ROWS = {
    (1, "half", "half"): (127, 187),
    (1, "half", "float"): (123, 187),
    (1, "float", "float"): (110, 144),
    (4, "half", "half"): (288, 501),
    (4, "half", "float"): (216, 501),
    (4, "float", "float"): (191, 304),
}
# Of a mixed batch's products, whose rows are gathered: W, Delta, of the input gradient.
MOST_MIXED = {
    ("half", "half", False): (68, 52),
    ("half", "float", False): (110, 52),
    ("float", "float", False): (98, 68),
    ("half", "half", True): (75, 54),
    ("half", "float", True): (122, 54),
    ("float", "float", True): (116, 76),
}
MOST_MIXED_WEIGHT = 134  # where each row that is fetched is looked up
MOST_WEIGHT = 79  # of the weight's gradient, whose sixteen mma are of two steps of the others


def loop_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loop_table", ROOT / "tools/loop_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loop_table"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def counted(folder: Path, file: str) -> dict[str, list[Any]]:
    """Kernel of csrc/cuda/FILE.cu by its C++ name -> instructions of its loops on sm_90a, longest first.

    Of those without tensor cores with the loads of W and Delta.
    """
    tool, cubin = loop_table(), folder / f"{file}.cubin"
    includes = [f"-I{path}" for path in (CSRC, CSRC / "cuda", *include_paths())]
    options = ["-cubin", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-arch=sm_90a", *includes]
    subprocess.run([str(NVCC), *options, str(CSRC / f"cuda/{file}.cu"), "-o", str(cubin)], check=True, timeout=600)
    functions = tool.functions(tool.disassembled(cubin, str(NVDISASM)))
    names = subprocess.run(["c++filt"], input="\n".join(functions), capture_output=True, text=True, check=True).stdout
    return {
        name: [loop.instructions for loop in tool.loops(function, blocks)]
        or [(loop.instructions, loop.copies) for loop in tool.streams(function, blocks)]
        for (function, blocks), name in zip(functions.items(), names.splitlines(), strict=True)
    }


def key_of(name: str) -> tuple[Any, ...]:
    """Rows of the tile, W, Delta."""
    rows = int(re.findall(r"Shape<(\d+),", name)[0])
    _, *types = re.findall(r", (?:taps::dev::)?(b?f16|float)(?=[,>])", name)
    return (rows, *("float" if one == "float" else "half" for one in types))


def test_main_loops_do_not_grow(tmp_path: Path) -> None:
    """On sm_90a; sm_80 has up to ten instructions less."""
    found, found_wide = set(), set()
    for name, loops in counted(tmp_path, "linear").items():
        if "WeightGradient" in name:
            assert len(loops) == 1 and loops[0] <= MOST_WEIGHT, (name, loops)
            continue
        if "Rows<" in name:
            rows, *types = re.findall(r"Rows<(\d), \S+, (\S+), (\S+?)>", name)[0]
            key = (int(rows), *("float" if one == "float" else "half" for one in types))
            opened, closed = sorted(loops)  # the closed one has more of a row in a step
            assert len(loops) == 2 and all(copies >= 6 for _, copies in loops), (name, loops)
            assert opened[0] <= MOST_ROWS[key][0] and closed[0] <= MOST_ROWS[key][1], (name, loops, MOST_ROWS[key])
            found.add(("rows", *key))
            continue
        if "Activation" not in name:
            continue
        clustered = "clustered_product<" in name
        if ", 128, " in name:
            wide = (MOST_WIDE | MOST_WIDE_CLUSTERED if clustered else MOST_WIDE)[key_of(name)]
            assert len(loops) == 2 and loops[0] <= wide[0] and loops[1] <= wide[1], (name, loops, wide)
            found_wide.add((clustered, *key_of(name)))
            continue
        key = (*key_of(name), ", true>, " in name)
        most = (MOST | MOST_CLUSTERED if clustered else MOST)[key]
        assert len(loops) == 2 and loops[0] <= most[0] and loops[1] <= most[1], (name, loops, most)
        found.add((clustered, *key))
    both = (False, True)
    assert found == {*((one, *key) for one in both for key in MOST), *(("rows", *key) for key in MOST_ROWS)}
    assert found_wide == {(one, *key) for one in both for key in MOST_WIDE}


def test_loops_of_convolutions_do_not_grow(tmp_path: Path) -> None:
    found = set()
    for name, loops in counted(tmp_path, "conv2d").items():
        most = MOST_CONVOLVED[key_of(name)]
        assert len(loops) == 2 and loops[0] <= most[0] and loops[1] <= most[1], (name, loops, most)
        found.add(key_of(name))
    assert found == MOST_CONVOLVED.keys()


def test_loops_of_mixed_batches_do_not_grow(tmp_path: Path) -> None:
    found = set()
    for name, loops in counted(tmp_path, "mixed").items():
        if "MixedWeightGradient" in name:
            assert len(loops) == 1 and loops[0] <= MOST_MIXED_WEIGHT, (name, loops)
        elif "MixedActivation" in name:
            key = (*key_of(name)[1:], ", true>, " in name)
            most = MOST_MIXED[key]
            assert len(loops) == 2 and loops[0] <= most[0] and loops[1] <= most[1], (name, loops, most)
            found.add(key)
    assert found == MOST_MIXED.keys()
