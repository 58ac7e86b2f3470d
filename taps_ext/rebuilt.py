"""W_t in the workspace for a stock op that runs at once: the rebuild path, without an operator's costs.

To call an operator of an extension from Python costs several times what `torch.add` costs, and most where caches are
cold. The usual open layer on a CPU, with everything dense and of one layout, is rebuilt by a plain call instead, and
torch's own function multiplies. The result is the operator's to the bit: it does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype in csrc/kernels.h
_PLAIN = (Tensor, nn.Parameter)
_MOST = 1024  # views that are kept

# By address, shape, strides and type. A view is only used while its memory is leased, whoever leased it before.
_views: dict[tuple[Any, ...], Tensor] = {}


def _view(extension: Any, address: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    key = (address, like.size(), like.stride(), dtype)
    view = _views.get(key)
    if view is None:
        if len(_views) >= _MOST:
            _views.clear()
        with torch.inference_mode(False), torch.no_grad():
            memory = extension.memory(address, like.numel() * dtype.itemsize)
            view = torch.frombuffer(memory, dtype=dtype).as_strided(like.size(), like.stride())
        _views[key] = view
    return view


def one_layout(weight: Tensor, delta: Tensor) -> bool:
    if weight.is_contiguous():
        return delta.is_contiguous()
    last = torch.channels_last
    return weight.dim() == 4 and weight.is_contiguous(memory_format=last) and delta.is_contiguous(memory_format=last)


def _watched() -> bool:
    """True where someone may keep a function's arguments (a mode, a trace), or is to see our operators."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
    )


def forget() -> None:
    """Drop the views: the memory that they were of has been freed."""
    _views.clear()


def product(
    extension: Any, stock: Callable[..., Tensor], input: Tensor, weight: Tensor, delta: Tensor, rows: int, *rest: Any
) -> Tensor | None:
    """`stock(input, W_t, *rest)` with the gate open, or None where the operator must do it.

    Args:
        extension: `taps_ext._C`, or None where it is missing.
        rows: of a product without gradients, which might be fused (the pixels of a result); else -1.
    """
    if (
        extension is None
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or type(delta) not in _PLAIN
        or not (input.is_cpu and weight.is_cpu and delta.is_cpu)
        or weight.is_neg()
        or delta.is_neg()
        or not one_layout(weight, delta)
        or _watched()
    ):
        return None
    dtype = input.dtype
    code, own, other = _CODES.get(dtype), _CODES.get(weight.dtype), _CODES.get(delta.dtype)
    if code is None or own is None or other is None:
        return None
    numel, shape = weight.numel(), weight.shape
    places = shape[2] * shape[3] if len(shape) == 4 else 0
    made = extension.rebuild(weight.data_ptr(), own, delta.data_ptr(), other, numel, code, rows, shape[0], places)
    if made is None:
        return None
    address, lease = made  # given back when this call returns
    view = _view(extension, address, weight, dtype)
    try:
        return stock(input, view, *rest)
    except RuntimeError:  # the operator says what is wrong, in its own words
        return None
    finally:
        del lease, made
