"""The gated convolution: signature, autograd, fakes. Its schema is in `csrc/ops.cpp`, its semantics in `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules.utils import _pair

from .. import reference
from ..extension import C
from .call import (
    Settings,
    at_once,
    below_autograd,
    checked,
    fitting,
    in_order,
    keep,
    kept,
    register_autograd,
    rests,
    usual,
    wants_gradient,
)
from .fakes import gradients, register_fake
from .once import once_differentiable


class Geometry(NamedTuple):
    """`[h, w]` each, padding symmetric; `groups` as in :func:`torch.nn.functional.conv2d`."""

    stride: tuple[int, ...]
    padding: Sequence[int]
    dilation: tuple[int, ...]
    groups: int


def two(value: int | Sequence[int]) -> tuple[int, ...]:
    """One int or a list of one for both axes, as `F.conv2d` takes them."""
    if type(value) is tuple and len(value) == 2:
        return value
    pair = tuple(_pair(value))
    return pair * 2 if len(pair) == 1 else pair


def symmetric_padding(
    padding: str | int | tuple[int, ...], weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Sequence[int], list[int] | None]:
    """Symmetric padding `[h, w]`, and what `F.pad` must add first where "same" is asymmetric."""
    if not isinstance(padding, str):
        return two(padding), None
    if padding == "valid":
        return (0, 0), None
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
    asked = gate is True and rows is None and not isinstance(padding, str) and at_once()
    if asked:  # the plain function looks at everything itself
        geometry = (stride, padding, dilation, groups)
        made = C.conv2d(input, weight, delta, score, bias, *geometry, True, False, True)  # type: ignore[union-attr]
        if made is not None:
            return made
    if not usual(input, weight, delta, score, bias, gate):
        input, asked = checked(input, weight, delta, score, bias, gate), False
        if reference.transformed(input, weight, delta, score, bias):
            known: dict[str, Any] = {"gate": gate, "threshold": threshold}
            return reference.gated_conv2d(input, weight, delta, score, bias, stride, padding, dilation, groups, **known)
    if input.dim() != 4 or weight.dim() != 4:
        _check_images(input, weight, rows)
    if rests(weight, score, gate, input.dtype):
        return F.conv2d(input, weight, fitting(bias, weight, input), stride, padding, dilation, groups)
    if input.dim() == 3:
        given = (stride, padding, dilation, groups)
        return gated_conv2d(input[None], weight, delta, score, bias, *given, gate=gate, threshold=threshold)[0]
    if C is None:
        known = {"gate": gate, "threshold": threshold, "rows": rows, "row_scale": row_scale}
        return reference.gated_conv2d(input, weight, delta, score, bias, stride, padding, dilation, groups, **known)
    steps, spread = two(stride), two(dilation)
    pad, ahead = symmetric_padding(padding, weight, steps, spread)
    if ahead is not None:
        input = F.pad(input, ahead)
    shape = Geometry(steps, pad, spread, groups)
    training = wants_gradient(input, weight, delta, score, bias)
    settings = Settings(gate, threshold, rows, row_scale, training)
    if is_compiling():
        return torch.ops.taps_ext.gated_conv2d(input, weight, delta, score, bias, *shape, *settings)
    if training:
        return GatedConv2d.apply(input, weight, delta, score, bias, shape, settings)
    return (operator if asked else product)(input, weight, delta, score, bias, shape, settings)


def operator(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    settings: Settings,
) -> Tensor:
    """The layer without autograd, by the operator."""
    with below_autograd():
        return torch.ops.taps_ext.gated_conv2d.default(input, weight, delta, score, bias, *geometry, *settings)


def product(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    settings: Settings,
) -> Tensor:
    """The layer without autograd, for batches and paddings of two ints: as `linear.product`."""
    if settings.gate is not None and settings.rows is None:
        with below_autograd():
            made = C.conv2d(  # type: ignore[union-attr]
                input, weight, delta, score, bias, *geometry, settings.gate, settings.training, False
            )
        if made is not None:
            return made
    return operator(input, weight, delta, score, bias, geometry, settings)


_autocast = torch._C._is_any_autocast_enabled


def _without_autocast(gradient: Tensor, *arguments: Any) -> Any:
    """A backward may run inside a region of autocast, whose types are those of forwards: torch's own backward of a
    convolution does not heed it, but the convolutions that ours is made of would."""
    with torch.autocast(gradient.device.type, enabled=False):
        return _operator_of_backward(gradient, *arguments)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # a graph is made of this, which knows no further derivative
        return _refusing(ctx, grad_output)
    input, weight, delta, score, settings, wanted = kept(ctx)
    geometry, input_size = ctx.geometry
    run = _operator_of_backward if not _autocast() else _without_autocast
    grads = run(
        grad_output,
        input,
        input_size,
        weight,
        delta,
        score,
        settings.gate,
        settings.threshold,
        *geometry,
        list(wanted),
        settings.rows,
        settings.row_scale,
    )
    return *in_order(ctx, grads, wanted), None, None


_refusing = once_differentiable(_backward)


class GatedConv2d(torch.autograd.Function):
    """The layer with a gradient, for eager calls: cheaper to call than the operator's own."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        delta: Tensor,
        score: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
        settings: Settings,
    ) -> Tensor:
        output = product(input, weight, delta, score, bias, geometry, settings)
        ctx.geometry = geometry, input.shape[-2:]
        keep(ctx, input, weight, delta, score, bias, settings)
        return output

    backward = staticmethod(_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = Geometry(*inputs[5:9]), tuple(inputs[0].shape[-2:])
    input, weight, delta, score, bias = inputs[:5]
    keep(ctx, input, weight, delta, score, bias, Settings(*inputs[9:]))


def _operator_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return (*_backward(ctx, grad_output)[:5], *(None for _ in (*Geometry._fields, *Settings._fields)))


# ---------------------------------------------------------------------------------------------- for tracing


def _fake(
    input: Tensor,
    weight: Tensor,
    delta: Any,
    score: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    gate: Any,
    threshold: float,
    rows: Any = None,
    row_scale: float = 1.0,
    training: bool = False,
) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight.to(input.dtype), bias, stride, padding, dilation, groups)


def data_gradient_like(dy: Tensor, x: Tensor | None, input_size: Any, weight: Tensor, geometry: Geometry) -> Tensor:
    """A batch's dL/dx by the operators that run, since its strides are theirs."""
    weight_t = weight.to(dy.dtype)
    stride, padding, dilation, groups = geometry
    if x is not None:
        arguments = (stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        return torch.ops.aten.convolution_backward(dy, x, weight_t, None, *arguments)[0]
    sizes = zip(input_size, dy.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    more = [whole - ((y - 1) * s - 2 * p + d * (k - 1) + 1) for whole, y, k, s, p, d in sizes]
    made: Tensor = torch.ops.aten.convolution(dy, weight_t, None, stride, padding, dilation, True, more, groups)
    return made


def _fake_backward(
    grad_output: Tensor,
    input: Any,
    input_size: Any,
    weight: Tensor,
    delta: Any,
    score: Any,
    gate: Any,
    threshold: float,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_mask: list[bool],
    rows: Any,
    row_scale: float,
) -> tuple[Tensor, ...]:
    dinput = None
    if output_mask[0]:
        single = grad_output.dim() == 3
        dy, x = (t[None] if single and t is not None else t for t in (grad_output, input))
        geometry = Geometry(stride, padding, dilation, groups)
        dinput = data_gradient_like(dy, x if rows is None else None, input_size, weight, geometry)
        dinput = dinput[0] if single else dinput
    return gradients(dinput, grad_output, weight, delta, score, output_mask)


_operator_of_backward: Any = None if C is None else torch.ops.taps_ext.gated_conv2d_backward.default
if C is not None:
    register_fake("gated_conv2d", _fake)
    register_fake("gated_conv2d_backward", _fake_backward)
    register_autograd("gated_conv2d", _setup, _operator_backward)
