"""The gated layers as eager calls make them: rebuilt without an operator where that is faster, else the operator."""

from __future__ import annotations

from collections.abc import Sequence

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


def _pixels(
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
    gate: bool | None,
    threshold: float,
    rows: Tensor | None,
    row_scale: float,
    training: bool,
) -> Tensor:
    if gate is True and weight.dim() == 2 and input.dim() and _operands_fit(input, weight, score, bias, rows):
        count = -1 if training else input.numel() // max(1, input.shape[-1])
        made = rebuilt.product(C, F.linear, input, weight, delta, count, bias)
        if made is not None:
            return made
    with _below_autograd():
        return torch.ops.taps_ext.gated_linear.default(
            input, weight, delta, score, bias, gate, threshold, rows, row_scale, training
        )


def run_conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: list[int],
    dilation: tuple[int, ...],
    groups: int,
    gate: bool | None,
    threshold: float,
    rows: Tensor | None,
    row_scale: float,
    training: bool,
) -> Tensor:
    if gate is True and _operands_fit(input, weight, score, bias, rows):
        count = -1 if training or groups != 1 else _pixels(input, weight, stride, padding, dilation)
        made = rebuilt.product(C, F.conv2d, input, weight, delta, count, bias, stride, padding, dilation, groups)
        if made is not None:
            return made
    with _below_autograd():
        return torch.ops.taps_ext.gated_conv2d.default(
            input,
            weight,
            delta,
            score,
            bias,
            stride,
            padding,
            dilation,
            groups,
            gate,
            threshold,
            rows,
            row_scale,
            training,
        )


# The same with gradients.
linear = autograd.differentiable(run_linear, autograd.linear_setup, autograd.linear_backward)
conv2d = autograd.differentiable(run_conv2d, autograd.conv2d_setup, autograd.conv2d_backward)
