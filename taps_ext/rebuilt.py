"""W_t in the workspace for a stock op that runs at once: the rebuild path, without an operator's costs.

To call an operator of an extension from Python costs several times what `torch.add` costs, and most where caches are
cold. The usual open layer on a CPU, with everything dense and of one layout, is rebuilt by a plain call instead, and
torch's own function multiplies; so are the gradients of a linear layer, the smallest of which cost less than the
operator's call. The results are the operator's to the bit: it does the same.
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


def _usual(activation: Tensor, weight: Tensor, delta: Tensor) -> bool:
    """True for plain dense tensors of one layout on the CPU, and nobody watching."""
    return (
        type(activation) in _PLAIN
        and type(weight) in _PLAIN
        and type(delta) in _PLAIN
        and activation.is_cpu
        and weight.is_cpu
        and delta.is_cpu
        and not weight.is_neg()
        and not delta.is_neg()
        and one_layout(weight, delta)
        and not _watched()
    )


def forget() -> None:
    """Drop the views: the memory that they were of has been freed."""
    _views.clear()


def product(
    extension: Any,
    stock: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    gate: bool,
    rows: int,
    *rest: Any,
) -> Tensor | None:
    """`stock(input, W_t, *rest)`, or None where the operator must do it.

    Args:
        extension: `taps_ext._C`, or None where it is missing.
        rows: of a product without gradients, which might be fused (the pixels of a result); else -1.
    """
    if extension is None or not _usual(input, weight, delta):
        return None
    dtype = input.dtype
    code, own, other = _CODES.get(dtype), _CODES.get(weight.dtype), _CODES.get(delta.dtype)
    if code is None or own is None or other is None:
        return None
    made = None
    if gate:
        numel, shape = weight.numel(), weight.shape
        places = shape[2] * shape[3] if len(shape) == 4 else 0
        made = extension.rebuild(weight.data_ptr(), own, delta.data_ptr(), other, numel, code, rows, shape[0], places)
        if made is None:
            return None
        weight = _view(extension, made[0], weight, dtype)
    elif own != code:
        return None
    try:
        return stock(input, weight, *rest)
    except RuntimeError:  # the operator says what is wrong, in its own words
        return None
    finally:
        del made  # the lease with it


def linear_gradients(
    extension: Any,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor,
    gate: bool,
    of_bias: torch.dtype | None,
) -> tuple[Tensor | None, ...] | None:
    """(dinput, None, ddelta, dscore, dbias, None) of a linear layer, or None where the operator must do it.

    A closed gate has no ddelta. Of one type all but score and bias: what is cast on the way is the operator's.

    Args:
        of_bias: the type of a bias that is to have a gradient.
    """
    dtype = grad_output.dtype
    code, own = _CODES.get(dtype), _CODES.get(score.dtype)
    if (
        extension is None
        or code is None
        or own is None
        or not weight.numel()
        or not input.dtype == weight.dtype == delta.dtype == dtype
        or type(input) not in _PLAIN
        or not _usual(grad_output, weight, delta)
        or torch._C._is_any_autocast_enabled()  # the products below would be of another type
    ):
        return None
    numel, flat = weight.numel(), input.dim() == 2
    x = input if flat else input.reshape(-1, input.shape[-1])
    dy = grad_output if flat else grad_output.reshape(-1, grad_output.shape[-1])
    made = (
        extension.rebuild(weight.data_ptr(), code, delta.data_ptr(), code, numel, code, -1, 0, 0)
        if gate
        else extension.gradient_scratch(numel, code)  # leased until the score has its gradient
    )
    if made is None:
        return None
    try:
        scratch = _view(extension, made[0], weight, dtype)
        dinput = torch.mm(dy, scratch if gate else weight)
        gradient = torch.mm(dy.t(), x) if gate else torch.mm(dy.t(), x, out=scratch)  # dL/dW_t
        dscore = torch.empty_like(score)
        finite = extension.dot_into(dscore.data_ptr(), own, gradient.data_ptr(), delta.data_ptr(), code, numel)
    except RuntimeError:  # as where gradients are batched (is_grads_batched): the operator can
        return None
    finally:
        del made
    if not gate and not finite:
        return None  # the operator says which tensor is to blame
    return (
        dinput if flat else dinput.view(input.shape),
        None,
        gradient if gate else None,
        dscore,
        None if of_bias is None else dy.sum(0).to(of_bias),
        None,
    )
