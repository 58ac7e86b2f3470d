"""The gated layers as eager calls make them: rebuilt without an operator where that is faster, else the operator.

Their settings travel as one tuple, because autograd looks at every argument: (gate, threshold, rows, row_scale,
training), ahead of them a convolution's (stride, padding, dilation, groups).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, rebuilt
from .extension import C

# What autograd does for an operator is done, or not asked for, where these run: they go to the kernels at once, past
# the Python function that `register_autograd` puts before them. It costs more than the call of a small layer.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _operands_fit(
    input: Tensor, weight: Tensor, score: Tensor | None, bias: Tensor | None, rows: Tensor | None
) -> bool:
    """True where the operator would have nothing to complain of that torch's own functions let pass."""
    return (
        rows is None
        and (bias is None or (bias.dtype == input.dtype and bias.size() == weight.shape[:1]))
        and (score is None or (score.is_cpu and score.dtype in (torch.float32, torch.float64)))
    )


def pixels(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Pixels of a convolution's result; what the operator would refuse has any number of them."""
    if not len(stride) == len(padding) == len(dilation) == 2:
        return -1
    count = input.shape[0]
    for axis in (0, 1):
        span = input.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1
        count *= span // (stride[axis] or 1) + 1
    return int(count)


def run_linear(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    gate, _, rows, _, training = settings
    if gate is not None and weight.dim() == 2 and input.dim() and _operands_fit(input, weight, score, bias, rows):
        count = -1 if training else input.numel() // max(1, input.shape[-1])
        made = rebuilt.product(C, F.linear, input, weight, delta, gate, count, bias)
        if made is not None:
            return made
    with _below_autograd():
        return torch.ops.taps_ext.gated_linear.default(input, weight, delta, score, bias, *settings)


def run_conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    stride, padding, dilation, groups, gate, _, rows, _, training = settings
    if gate is not None and _operands_fit(input, weight, score, bias, rows):
        count = -1 if training or groups != 1 else pixels(input, weight, stride, padding, dilation)
        made = rebuilt.product(C, F.conv2d, input, weight, delta, gate, count, bias, stride, padding, dilation, groups)
        if made is not None:
            return made
    with _below_autograd():
        return torch.ops.taps_ext.gated_conv2d.default(input, weight, delta, score, bias, *settings)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    autograd.save(ctx, inputs, inputs[5][:4])


def _linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    kept = autograd.saved(ctx)
    input, weight, delta, score, rows, gate, _, _, mask = kept
    if gate is not None and rows is None and mask[:3] == [True, gate, True] and not mask[4]:
        of_bias = ctx.kept[-1] if mask[3] else None
        made = rebuilt.linear_gradients(C, grad_output, input, weight, delta, score, gate, of_bias)
        if made is not None:
            return made
    return *autograd.linear_gradients(ctx, grad_output, kept), None


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    autograd.keep_geometry(ctx, inputs[0], inputs[5][:4])
    autograd.save(ctx, inputs, inputs[5][4:8])


def _conv2d_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return *autograd.conv2d_gradients(ctx, grad_output), None


# The same with gradients.
linear = autograd.differentiable(run_linear, _linear_setup, _linear_backward)
conv2d = autograd.differentiable(run_conv2d, _conv2d_setup, _conv2d_backward)
