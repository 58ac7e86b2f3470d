"""The gated layers as eager calls make them: by one plain function where that is enough, else by the operator.

To call an operator of an extension from Python costs several times what `torch.add` costs, and most where caches are
cold. The usual open layer on a CPU, with everything dense and of one layout, is a plain function of the extension
instead (csrc/core/layer.h). The results are the operator's to the bit: it does the same.

Their settings travel as one tuple, because autograd looks at every argument: (gate, threshold, rows, row_scale,
training), ahead of them a convolution's (stride, padding, dilation, groups).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autograd
from .extension import C

# What autograd does for an operator is done, or not asked for, where these run: they go to the kernels at once, past
# the Python function that `register_autograd` puts before them. It costs more than the call of a small layer.
_below_autograd = torch._C._AutoDispatchBelowAutograd


def linear_operator(*inputs: Any) -> Tensor:
    *tensors, settings = inputs
    with _below_autograd():
        return torch.ops.taps_ext.gated_linear.default(*tensors, *settings)


def run_linear(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    gate, _, rows, _, training = settings
    if gate is not None and rows is None and C is not None:
        made = C.linear(input, weight, delta, score, bias, gate, training, False)
        if made is not None:
            return made
    return linear_operator(input, weight, delta, score, bias, settings)


def conv2d_operator(*inputs: Any) -> Tensor:
    *tensors, settings = inputs
    with _below_autograd():
        return torch.ops.taps_ext.gated_conv2d.default(*tensors, *settings)


def run_conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    bias: Tensor | None,
    settings: tuple[Any, ...],
) -> Tensor:
    stride, padding, dilation, groups, gate, _, rows, _, training = settings
    if gate is not None and rows is None and C is not None:
        made = C.conv2d(input, weight, delta, score, bias, stride, padding, dilation, groups, gate, training, False)
        if made is not None:
            return made
    return conv2d_operator(input, weight, delta, score, bias, settings)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    autograd.save(ctx, inputs, inputs[5][:4])


def _linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return *autograd.linear_gradients(ctx, grad_output, autograd.saved(ctx)), None


def _conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    autograd.keep_geometry(ctx, inputs[0], inputs[5][:4])
    autograd.save(ctx, inputs, inputs[5][4:8])


def _conv2d_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return *autograd.conv2d_gradients(ctx, grad_output), None


# The same with gradients.
linear = autograd.differentiable(run_linear, _linear_setup, _linear_backward)
conv2d = autograd.differentiable(run_conv2d, _conv2d_setup, _conv2d_backward)
