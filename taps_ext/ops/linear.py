"""The gated linear layer: signature, autograd, fakes. Its schema is in `csrc/ops.cpp`, its semantics in `reference`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

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
    asked = gate is True and rows is None and at_once()
    if asked:  # the plain function looks at everything itself
        made = C.linear(input, weight, delta, score, bias, True, False, True)  # type: ignore[union-attr]
        if made is not None:
            return made
    if not usual(input, weight, delta, score, bias, gate):
        input, asked = checked(input, weight, delta, score, bias, gate), False
        if reference.transformed(input, weight, delta, score, bias):
            return reference.gated_linear(input, weight, delta, score, bias, gate=gate, threshold=threshold)
    if rests(weight, score, gate, input.dtype):
        return F.linear(input, weight, fitting(bias, weight, input))
    if C is None:
        return reference.gated_linear(
            input, weight, delta, score, bias, gate=gate, threshold=threshold, rows=rows, row_scale=row_scale
        )
    training = wants_gradient(input, weight, delta, score, bias)
    settings = Settings(gate, threshold, rows, row_scale, training)
    if is_compiling():
        return torch.ops.taps_ext.gated_linear(input, weight, delta, score, bias, *settings)
    if training:
        return GatedLinear.apply(input, weight, delta, score, bias, settings)
    return (operator if asked else product)(input, weight, delta, score, bias, settings)


def operator(
    input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None, settings: Settings
) -> Tensor:
    """The layer without autograd, by the operator."""
    with below_autograd():
        return torch.ops.taps_ext.gated_linear.default(input, weight, delta, score, bias, *settings)


def product(
    input: Tensor, weight: Tensor, delta: Tensor, score: Tensor | None, bias: Tensor | None, settings: Settings
) -> Tensor:
    """The layer without autograd: by one plain function of the extension where that is enough, else by the operator.

    To call an operator of an extension from Python costs several times what `torch.add` costs, and most where caches
    are cold (benchmarks/plumbing.py). The results are the operator's to the bit: both do the same.
    """
    if settings.gate is not None and settings.rows is None:
        with below_autograd():
            made = C.linear(input, weight, delta, score, bias, settings.gate, settings.training, False)  # type: ignore[union-attr]
        if made is not None:
            return made
    return operator(input, weight, delta, score, bias, settings)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # a graph is made of this, which knows no further derivative
        return _refusing(ctx, grad_output)
    input, weight, delta, score, settings, wanted = kept(ctx)
    grads = torch.ops.taps_ext.gated_linear_backward.default(
        grad_output,
        input,
        weight,
        delta,
        score,
        settings.gate,
        settings.threshold,
        list(wanted),
        settings.rows,
        settings.row_scale,
    )
    return *in_order(ctx, grads, wanted), None


_refusing = once_differentiable(_backward)


class GatedLinear(torch.autograd.Function):
    """The layer with a gradient, for eager calls: cheaper to call than the operator's own."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        delta: Tensor,
        score: Tensor | None,
        bias: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        output = product(input, weight, delta, score, bias, settings)
        keep(ctx, input, weight, delta, score, bias, settings)
        return output

    backward = staticmethod(_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, delta, score, bias = inputs[:5]
    keep(ctx, input, weight, delta, score, bias, Settings(*inputs[5:]))


def _operator_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return (*_backward(ctx, grad_output)[:5], *(None for _ in Settings._fields))


# ---------------------------------------------------------------------------------------------- for tracing


def _fake(
    input: Tensor,
    weight: Tensor,
    delta: Any,
    score: Any,
    bias: Any,
    gate: Any,
    threshold: float,
    rows: Any = None,
    row_scale: float = 1.0,
    training: bool = False,
) -> Tensor:
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: (
            f"input: expected shape [..., {weight.shape[1]}] for a weight of shape {list(weight.shape)}, got "
            f"{list(input.shape)}"
        ),
    )
    return input.new_empty([*input.shape[:-1], weight.shape[0]])


def _fake_backward(
    grad_output: Tensor,
    input: Any,
    weight: Tensor,
    delta: Any,
    score: Any,
    gate: Any,
    threshold: float,
    output_mask: list[bool],
    rows: Any,
    row_scale: float,
) -> tuple[Tensor, ...]:
    shape = [*grad_output.shape[:-1], weight.shape[1]]
    dinput = grad_output.new_empty(shape) if output_mask[0] else None
    return gradients(dinput, grad_output, weight, delta, score, output_mask)


if C is not None:
    register_fake("gated_linear", _fake)
    register_fake("gated_linear_backward", _fake_backward)
    register_autograd("gated_linear", _setup, _operator_backward)
