"""Small tensors of known values on a device, made once: a copy to a GPU at each step would wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 64
_kept: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[len(values)]`, to be read and never written to or handed on. What is made under a mode (a fake tensor, one of
    inference mode) is that mode's and not kept."""
    key = values, device, dtype
    found = _kept.get(key)
    if found is None:
        found = torch.tensor(values, device=device, dtype=dtype)
        if type(found) is Tensor and not found.is_inference() and not torch.compiler.is_compiling():
            if len(_kept) >= _MOST:
                _kept.clear()
            _kept[key] = found
    return found
