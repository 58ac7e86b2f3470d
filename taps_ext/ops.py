"""Python side of the custom operators: the public signatures. Their schemas live in `csrc/ops.cpp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.utils import _pair

from . import autograd, composed, eager, fakes, flops, reference
from .extension import C as _C
from .reconstruct import check_gate, foreach_reconstruct_, reconstruct_

HAS_EXTENSION: bool = _C is not None

__all__ = [
    "HAS_EXTENSION",
    "effective_weight",
    "foreach_reconstruct_",
    "gated_conv2d",
    "gated_linear",
    "reconstruct_",
    "unread_weight",
]


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


def _check(
    input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None, gate: bool | None
) -> Tensor:
    """Check what the kernels cannot and return the input in its compute type."""
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


def _plain(
    input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None, gate: bool | None
) -> bool:
    """True for the usual call, eager and with nothing to convert or to complain of; others go the longer way.

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
            and not composed.may_be_transformed()
        )
    except (AttributeError, TypeError):  # something that is no tensor: _check says which
        return False


def _rests(weight: Tensor, score: Tensor | None, gate: bool | None, dtype: torch.dtype) -> bool:
    """True where a closed host gate leaves nothing to do but the stock op: no score gradient, no cast of W."""
    if gate is not False or (score is not None and score.requires_grad and torch.is_grad_enabled()):
        return False
    return weight.dtype == dtype or weight.requires_grad


def _at_once() -> bool:
    """True where no gradients are asked for, so that an open layer may go straight to the extension (csrc/direct.h)."""
    return not is_compiling() and not torch.is_grad_enabled() and forward_ad._current_level < 0


def _fitting(bias: Tensor | None, weight: Tensor, input: Tensor) -> Tensor | None:
    """The bias as the operators take it: of the right shape, in any type."""
    if bias is None:
        return None
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"bias: expected shape {[weight.shape[0]]}, got {list(bias.shape)}")
    return bias if bias.dtype == input.dtype else bias.to(input.dtype)


def _differentiable(input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        delta.requires_grad
        or input.requires_grad
        or weight.requires_grad
        or (score is not None and score.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


# ---------------------------------------------------------------------------------------------- linear


def gated_linear(
    input: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
    rows: Tensor | None = None,
    row_scale: float = 1.0,
) -> Tensor:
    """Linear layer on `W + g * Delta` (TAPS, arXiv 2203.16708, equation 2).

    Args:
        input: `[..., K]`, floating point.
        weight: the frozen base weight W, `[N, K]`, in the input's dtype (any under autocast).
        delta: Delta, `[N, K]`, any floating dtype, or None for the base layer.
        score: one element; the gate is open where `score >= threshold`. Its gradient is <dL/dW_t, Delta>.
        bias: `[N]` or None.
        gate: the gate as the host knows it. None reads the score on its device, without synchronising.
        threshold: tau of the paper.
        rows, row_scale: `[R]`, int64: where `gate` is False and the weight frozen, the score's gradient is estimated
            from these rows of the input `[M, K]` (its leading dimensions as one), times `row_scale`, and backward keeps
            them alone. Where each row is drawn with the same probability and `row_scale` is its inverse, the estimate
            is unbiased. An open gate, or one that only the device knows, has its exact gradient.

    Returns:
        `[..., N]` in the compute dtype. A closed host gate is bit-equal to `F.linear(input, weight, bias)`. So is, on a
        CPU where gradients may be asked for, an open one to `F.linear(input, W_t, bias)`; elsewhere up to rounding.

    Raises:
        ValueError: shapes that do not fit; gate and score both None.
        TypeError: input and weight of different dtypes outside autocast; an argument that is no tensor, a gate that is
            no bool.
        RuntimeError: what the kernels find: dtypes, devices, the bias's and the input's last size; in backward on the
            CPU, a Delta with Inf or NaN in a closed layer whose score is trained.
    """
    if delta is None:
        return F.linear(input, weight, bias)
    if (  # closed, and no gradients: spelled out, because even a call of our own would be dear beside a small layer
        gate is False
        and not torch.is_grad_enabled()
        and not is_compiling()
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
    ):
        try:
            if delta.shape == weight.shape and (score is None or score.numel() == 1):
                return F.linear(input, weight, bias)
        except (AttributeError, RuntimeError, TypeError):
            pass  # what is wrong is said below
    asked = gate is True and rows is None and _at_once()
    if asked and _C is not None:
        made = _C.linear(input, weight, delta, score, bias, True, False, True)
        if made is not None:
            return made
    if not _plain(input, weight, delta, score, bias, gate):
        input, asked = _check(input, weight, delta, score, bias, gate), False
        if composed.transformed(input, weight, delta, score, bias):
            made = composed.reconstruct(weight, delta, score, gate=gate, threshold=threshold, dtype=input.dtype)
            return F.linear(input, made, bias)
    if _rests(weight, score, gate, input.dtype):
        return F.linear(input, weight, _fitting(bias, weight, input))
    if not HAS_EXTENSION:
        return reference.gated_linear(
            input, weight, delta, score, bias, gate=gate, threshold=threshold, rows=rows, row_scale=row_scale
        )
    training = _differentiable(input, weight, delta, score, bias)
    settings = (gate, threshold, rows, row_scale, training)
    if is_compiling():
        return torch.ops.taps_ext.gated_linear(input, weight, delta, score, bias, *settings)
    run = eager.linear if training else eager.linear_operator if asked else eager.run_linear
    return run(input, weight, delta, score, bias, settings)


# ---------------------------------------------------------------------------------------------- conv2d


def _two(value: int | Sequence[int]) -> tuple[int, ...]:
    """One int or a list of one for both axes, as `F.conv2d` takes them."""
    if type(value) is tuple and len(value) == 2:
        return value
    pair = tuple(_pair(value))
    return pair * 2 if len(pair) == 1 else pair


def _padding(
    padding: str | int | tuple[int, ...], weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[list[int], list[int] | None]:
    """Symmetric padding `[h, w]`, and what `F.pad` must add first where "same" is asymmetric."""
    if not isinstance(padding, str):
        return list(_two(padding)), None
    if padding == "valid":
        return [0, 0], None
    if padding != "same":
        raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
    if tuple(stride) != (1, 1):
        raise ValueError(f"padding: 'same' expects stride 1, got stride {tuple(stride)}")
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[-2:], strict=True)]
    extra = [t % 2 for t in total]  # the odd element goes behind, as in F.conv2d
    ahead = [0, extra[1], 0, extra[0]] if any(extra) else None
    return [t // 2 for t in total], ahead


def _check_images(input: Tensor, weight: Tensor, rows: Tensor | None) -> None:
    if weight.dim() != 4:
        raise ValueError(f"weight: expected [O, C / groups, kh, kw], got shape {list(weight.shape)}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input: expected [B, C, H, W] or [C, H, W], got shape {list(input.shape)}")
    if rows is not None and input.dim() == 3:
        raise ValueError(f"input: expected a batch for rows, got shape {list(input.shape)}")


def gated_conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
    rows: Tensor | None = None,
    row_scale: float = 1.0,
) -> Tensor:
    """2-D convolution with `W + g * Delta` (TAPS, arXiv 2203.16708, equation 2).

    Args:
        input: `[B, C, H, W]` or `[C, H, W]`, contiguous or channels_last.
        weight: the frozen base weight W, `[O, C / groups, kh, kw]`.
        delta: Delta, shaped like `weight`, or None for the base layer.
        score, gate, threshold, rows, row_scale: as in :func:`gated_linear`; rows are samples of the batch.
        bias: `[O]` or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, "same" and "valid" included.

    Returns:
        `[B, O, H', W']` (or unbatched), laid out as `F.conv2d` does. A closed host gate is bit-equal to `F.conv2d`; so
        is, on a CPU where gradients may be asked for, an open one to `F.conv2d` with W_t, elsewhere up to rounding.

    Raises:
        ValueError, TypeError: as :func:`gated_linear`; rows of an input without a batch; an unknown padding; "same"
            with a stride.
    """
    if delta is None:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    asked = gate is True and rows is None and not isinstance(padding, str) and _at_once()
    if asked and _C is not None:
        made = _C.conv2d(input, weight, delta, score, bias, stride, padding, dilation, groups, True, False, True)
        if made is not None:
            return made
    if not _plain(input, weight, delta, score, bias, gate):
        input, asked = _check(input, weight, delta, score, bias, gate), False
        if composed.transformed(input, weight, delta, score, bias):
            made = composed.reconstruct(weight, delta, score, gate=gate, threshold=threshold, dtype=input.dtype)
            return F.conv2d(input, made, bias, stride, padding, dilation, groups)
    if input.dim() != 4 or weight.dim() != 4:
        _check_images(input, weight, rows)
    if _rests(weight, score, gate, input.dtype):
        return F.conv2d(input, weight, _fitting(bias, weight, input), stride, padding, dilation, groups)
    geometry = (stride, padding, dilation, groups)
    if input.dim() == 3:
        batched = gated_conv2d(input[None], weight, delta, score, bias, *geometry, gate=gate, threshold=threshold)
        return batched[0]
    if not HAS_EXTENSION:
        known: dict[str, Any] = {"gate": gate, "threshold": threshold, "rows": rows, "row_scale": row_scale}
        return reference.gated_conv2d(input, weight, delta, score, bias, *geometry, **known)
    steps, spread = _two(stride), _two(dilation)
    pad, ahead = _padding(padding, weight, steps, spread)
    if ahead is not None:
        input = F.pad(input, ahead)
    training = _differentiable(input, weight, delta, score, bias)
    settings = (steps, pad, spread, groups, gate, threshold, rows, row_scale, training)
    if is_compiling():
        return torch.ops.taps_ext.gated_conv2d(input, weight, delta, score, bias, *settings)
    run = eager.conv2d if training else eager.conv2d_operator if asked else eager.run_conv2d
    return run(input, weight, delta, score, bias, settings)


# ------------------------------------------------------------------------------------ the weight itself


def effective_weight(
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """W_t = round(W + g * Delta) as a new tensor like `weight`, with the gradients of TAPS (equations 2 and 4).

    For readers of a weight that no gated op serves; it costs a weight-sized tensor, kept until backward.
    """
    if composed.transformed(weight, delta, score):
        return composed.reconstruct(weight, delta, score, gate=gate, threshold=threshold)
    if not HAS_EXTENSION:
        return reference.reconstruct(weight, delta, score, gate=gate, threshold=threshold)
    return _effective_weight(weight, delta, score, gate, threshold)


def unread_weight(
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """W itself, not W_t, with the gradients of :func:`effective_weight`: for those who never look at its values.

    Where the gate is known to be closed the two are the same, and this one costs no copy.
    """
    if composed.transformed(weight, delta, score):
        return composed.reconstruct(weight, delta, score, gate=gate, threshold=threshold, read=False)
    return _unread_weight(weight, delta, score, gate, threshold)


def _run_effective_weight(
    weight: Tensor, delta: Tensor, score: Tensor | None, gate: bool | None, threshold: float
) -> Tensor:
    return reconstruct_(torch.empty_like(weight), weight, delta, score, gate=gate, threshold=threshold)


def _run_unread_weight(
    weight: Tensor, delta: Tensor, score: Tensor | None, gate: bool | None, threshold: float
) -> Tensor:
    return weight.view_as(weight)


_effective_weight = autograd.differentiable(
    _run_effective_weight, autograd.effective_weight_setup, autograd.effective_weight_backward
)
_unread_weight = autograd.differentiable(
    _run_unread_weight, autograd.effective_weight_setup, autograd.effective_weight_backward
)

if HAS_EXTENSION:
    fakes.register()
    flops.register()
    for _name, _backward, _setup in (
        ("gated_linear", autograd.linear_backward, autograd.linear_setup),
        ("gated_conv2d", autograd.conv2d_backward, autograd.conv2d_setup),
    ):
        torch.library.register_autograd(f"taps_ext::{_name}", autograd.once(_backward), setup_context=_setup)
