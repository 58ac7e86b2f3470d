"""What the calls of every gated layer share: checks of arguments, and what autograd keeps between forward and backward.

A layer's five tensors travel in one order, (input, weight, delta, score, bias), and its settings as one named tuple
behind them, which begins with a convolution's geometry and ends with :class:`Settings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ..extension import C
from ..reference import may_be_transformed
from .once import NOT_TWICE
from .reconstruct import check_gate

# What autograd does for an operator is done, or not asked for, where this guard stands: calls go to the kernels at
# once, past the Python function that `register_autograd` puts before them, and results are views of nothing.
below_autograd = torch._C._AutoDispatchBelowAutograd


class Settings(NamedTuple):
    """How a gated layer is called, beside its tensors; the operators take these as their last arguments.

    `gate`, `threshold`, `rows`, `row_scale`: as in :func:`taps_ext.gated_linear`. `training`: gradients are asked for,
    so that the product is torch's own on W_t, to the bit.
    """

    gate: bool | None
    threshold: float = 0.1
    rows: Tensor | None = None
    row_scale: float = 1.0
    training: bool = False


class Wanted(NamedTuple):
    """Which gradients a backward operator gives, in the order of its results."""

    input: bool
    delta: bool
    score: bool
    bias: bool
    weight: bool


# ---------------------------------------------------------------------------------------------- before a call


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The autocast type that applies to `input`, or None."""
    if not is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.is_floating_point() and input.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return None


def _check_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def checked(
    input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None, gate: bool | None
) -> Tensor:
    """Check what the kernels cannot, and return the input in its compute type."""
    for name, value in (("input", input), ("weight", weight), ("delta", delta), ("score", score), ("bias", bias)):
        if value is not None or name in ("input", "weight"):
            _check_tensor(value, name)
    check_gate(gate, "gate")
    if delta.size() != weight.size():
        raise ValueError(f"delta: expected shape {list(weight.shape)} like weight, got {list(delta.shape)}")
    if gate is None and score is None:
        raise ValueError("score: expected a one-element tensor when gate is None, got None")
    if score is not None and score.numel() != 1:
        raise ValueError(f"score: expected one element, got shape {list(score.shape)}")
    dtype = autocast_dtype(input)
    if dtype is not None:
        return input.to(dtype)
    if input.dtype != weight.dtype:
        raise TypeError(f"input: expected dtype {weight.dtype} like weight (or autocast), got {input.dtype}")
    return input


def usual(
    input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None, gate: bool | None
) -> bool:
    """True for the usual call, eager and with nothing to convert or to complain of; others are :func:`checked`.

    One function and its few questions, because of a small layer they are most of the cost.
    """
    if is_compiling():  # what follows would break its graph
        return False
    try:
        return (
            isinstance(input, Tensor)
            and input.dtype == weight.dtype
            and delta.size() == weight.size()
            and (gate is True or gate is False or (gate is None and score is not None))
            and (score is None or score.numel() == 1)
            and (bias is None or isinstance(bias, Tensor))
            and not torch._C._is_any_autocast_enabled()
            and not may_be_transformed()
        )
    except (AttributeError, TypeError):  # something that is no tensor: `checked` says which
        return False


def at_once() -> bool:
    """True where no gradients are asked for in eager code, so that an open layer may be one plain function's affair."""
    return C is not None and not is_compiling() and not torch.is_grad_enabled() and forward_ad._current_level < 0


def rests(weight: Tensor, score: Tensor | None, gate: bool | None, dtype: torch.dtype) -> bool:
    """True where a closed host gate leaves nothing to do but the stock op: no score gradient, no cast of W."""
    if gate is not False or (score is not None and score.requires_grad and torch.is_grad_enabled()):
        return False
    return weight.dtype == dtype or weight.requires_grad


def fitting(bias: Tensor | None, weight: Tensor, input: Tensor) -> Tensor | None:
    """The bias as the operators take it: of the right shape, in any type."""
    if bias is None:
        return None
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"bias: expected shape {[weight.shape[0]]}, got {list(bias.shape)}")
    return bias if bias.dtype == input.dtype else bias.to(input.dtype)


def wants_gradient(input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None) -> bool:
    """True where autograd is to record the call."""
    return torch.is_grad_enabled() and (
        delta.requires_grad
        or input.requires_grad
        or weight.requires_grad
        or (score is not None and score.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


# ---------------------------------------------------------------------------------- from forward to backward

# Nodes that keep their result for backward, and nodes whose result is another view of their input.
_KEEPERS = ("Relu", "Sigmoid", "Tanh", "Softmax", "ScaledDotProduct")
_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Squeeze", "Unsqueeze", "T")


def _kept_by_its_maker(input: Tensor) -> bool:
    """True where the graph holds this tensor anyway: to keep it costs nothing, and to copy a part of it does."""
    node: Any = None if is_compiling() else input.grad_fn
    while node is not None:
        kind = type(node).__name__.partition("Backward")[0]
        if kind.startswith(_KEEPERS):
            return True
        node = node.next_functions[0][0] if kind in _VIEWS else None
    return False


def _rows_of(input: Tensor, rows: Tensor, ndim: int) -> Tensor:
    """The samples of an image batch, or the rows of a matrix (the leading dimensions as one)."""
    return (input.reshape(-1, input.shape[-1]) if ndim == 2 else input).index_select(0, rows)


def keep(
    ctx: Any,
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    settings: Settings,
) -> None:
    """Keep what backward reads: the input only if a weight gradient or gate gradient will be asked for.

    Of the input of a layer known to be closed, whose score alone asks for it, only what `rows` picks, unless the graph
    holds it anyway. A closed Delta rests: no gradient of it is asked for.
    """
    dinput, dweight, ddelta, dscore, _ = ctx.needs_input_grad[:5]
    closed, rows = settings.gate is False, settings.rows
    ddelta = ddelta and not closed
    picked = True
    if rows is not None:
        if closed and dscore and not dweight:
            picked = not _kept_by_its_maker(input)
            input = _rows_of(input, rows, weight.dim()) if picked else input
            settings = settings._replace(rows=None)  # kept beside the tensors
        else:
            rows, settings = None, settings._replace(rows=None, row_scale=1.0)
    elif settings.row_scale != 1.0:  # of no rows
        settings = settings._replace(row_scale=1.0)
    ctx.settings, ctx.picked = settings, picked
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(
        input if ddelta or dscore or dweight else None,
        weight,
        delta if ddelta or dscore or (dinput and not closed) else None,
        score if dscore or settings.gate is None else None,
        rows,
    )


class Kept(NamedTuple):
    """What backward reads: the input (what `rows` picks of it) and the rest of what :func:`keep` kept."""

    input: Tensor | None
    weight: Tensor
    delta: Tensor | None
    score: Tensor | None
    settings: Settings
    wanted: Wanted


def kept(ctx: Any) -> Kept:
    """What :func:`keep` kept, and which gradients are asked for now (maybe fewer than in forward)."""
    input, weight, delta, score, rows = ctx.saved_tensors
    if not ctx.picked:
        input = _rows_of(input, rows, weight.dim())
    dinput, dweight, ddelta, dscore, dbias = ctx.needs_input_grad[:5]
    settings = ctx.settings if rows is None else ctx.settings._replace(rows=rows)
    wanted = Wanted(dinput, ddelta and settings.gate is not False, dscore, dbias, dweight)
    return Kept(input, weight, delta, score, settings, wanted)


def in_order(ctx: Any, grads: tuple[Tensor, ...], wanted: Wanted) -> tuple[Tensor | None, ...]:
    """A backward operator's results in the order of the forward's tensors; what was not asked for is None."""
    dinput, ddelta, dscore, dbias, dweight = grads
    return (
        dinput if wanted.input else None,
        dweight if wanted.weight else None,
        ddelta if wanted.delta else None,
        dscore if wanted.score else None,
        dbias.to(ctx.bias_dtype) if wanted.bias else None,
    )


def register_autograd(name: str, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
    """The operator's gradient for compiled graphs and direct users of `torch.ops.taps_ext`."""

    def refusing(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and grad_output.requires_grad:
            raise RuntimeError(NOT_TWICE)
        return backward(ctx, grad_output)

    torch.library.register_autograd(f"taps_ext::{name}", refusing, setup_context=setup)
