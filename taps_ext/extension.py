"""The compiled extension, or None with a warning where it cannot be loaded."""

from __future__ import annotations

import importlib
import re
import warnings
from types import ModuleType

import torch

OPERATORS = (
    *(
        "reconstruct",
        "foreach_reconstruct",
        "foreach_settle",
        "unpack",
        "encode",
        "packed_linear",
        "gated_linear",
        "gated_linear_backward",
    ),
    *("gated_conv2d", "gated_conv2d_backward", "patch_sum", "patch_measure", "patch_encode", "patch_check"),
    *("patch_prove", "patch_write", "patch_swap"),
    *("mixed_linear", "mixed_linear_backward", "mixed_conv2d", "mixed_conv2d_backward"),
    *("mixed_lowrank", "mixed_lowrank_backward"),
)
"""All that it registers: one that was compiled from older sources lacks some."""


def _loaded() -> ModuleType:
    module = importlib.import_module("taps_ext._C")
    if missing := [name for name in OPERATORS if not hasattr(torch.ops.taps_ext, name)]:
        raise ImportError(f"it is older than these sources and has no operator {missing[0]}; run `make build`")
    return module


C: ModuleType | None
try:
    C = _loaded()
except ImportError as error:
    C = None
    warnings.warn(
        f"taps_ext: the compiled extension cannot be loaded ({error}); using the slower pure-torch reference",
        RuntimeWarning,
        stacklevel=2,
    )


def has_kernels(architectures: str, capability: tuple[int, int]) -> bool:
    """True if CUDA code that was built for these architectures runs on a device of this compute capability.

    Args:
        architectures: as CMake takes them, apart by spaces or semicolons: "80" is machine code and PTX, "80-real" the
            code alone, "80-virtual" the PTX alone. Code runs on the same major version from its minor one on, PTX on
            all that is newer; both of "90a" on 9.0 alone, of "100f" on one major version.
        capability: (major, minor).
    """
    for entry in re.split(r"[ ;]+", architectures.strip()):
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if found is None:
            continue
        built, kind, part = (int(found[1]), int(found[2])), found[3], found[4]
        if kind == "a":
            fits = built == capability
        elif kind == "f" or part == "-real":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False
