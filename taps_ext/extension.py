"""The compiled extension, or None with a warning where it cannot be loaded."""

from __future__ import annotations

import importlib
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
