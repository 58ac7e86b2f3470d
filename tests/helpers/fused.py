"""What the tests of the CPU's fused layers share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from taps_ext import ops

C = ops._C
F32, BF16 = torch.float32, torch.bfloat16
TYPES = [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16), (BF16, F32, F32)]  # of x and y, W, Delta
PLAIN, LAST = torch.contiguous_format, torch.channels_last


@contextmanager
def instructions(name: str):
    """With the kernels of one instruction set, where there are any."""
    if C is None:
        yield
        return
    C.force_isa(name)
    try:
        yield
    finally:
        C.force_isa(None)


def draw(*shape: int, dtype: torch.dtype, layout: torch.memory_format = PLAIN) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)


def taken(operator: Callable[..., Tensor], *args, **settings) -> tuple[Tensor, str | None]:
    """An operator's output and the path that choose() took."""
    C.taken_path()
    with torch.no_grad():
        output = operator(*args, **settings)
    return output, C.taken_path()


def fused(operator: Callable[..., Tensor], *args) -> Tensor:
    """The kernel's output, however few the weights are."""
    C.force_path("fused")
    try:
        output, path = taken(operator, *args)
    finally:
        C.force_path(None)
    assert path == "fused"
    return output
