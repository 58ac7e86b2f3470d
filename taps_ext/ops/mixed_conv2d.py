"""The convolution of a mixed batch: signature, autograd, fakes. Its schema is in `csrc/ops.cpp`, its semantics in
`reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import reference
from ..extension import C
from .call import below_autograd, register_autograd
from .conv2d import Geometry, data_gradient_like, symmetric_padding, two
from .fakes import mixed_gradients, register_fake
from .mixed_call import (
    Tasks,
    check_ids,
    check_values,
    checked_input,
    checked_tasks,
    expect_tracked,
    filled,
    in_order,
    keep,
    kept,
    learned,
    present,
    wants_gradient,
)
from .once import once_differentiable


def mixed_conv2d(
    input: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None,
    task_ids: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    gates: Sequence[bool | None] | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """2-D convolution of a batch whose samples belong to many tasks, each with `W + g_t * Delta_t` (TAPS, arXiv
    2203.16708, equation 2): every image is what :func:`gated_conv2d` gives for its own task.

    Args:
        input: `[k * B, C, H, W]`, contiguous or channels_last: k images a sample, sample after sample.
        weight: the frozen base weight W, `[O, C / groups, kh, kw]`.
        deltas, scores, task_ids, gates, threshold: as in :func:`mixed_linear`, a Delta shaped like `weight`.
        bias: `[O]` or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, "same" and "valid" included.

    Returns:
        `[k * B, O, H', W']`, laid out as `F.conv2d` does.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`mixed_linear`; an input that is no batch of images; an unknown
            padding; "same" with a stride.
    """
    input = checked_input(input, weight, bias)
    if weight.dim() != 4:
        raise ValueError(f"weight: expected [O, C / groups, kh, kw], got shape {list(weight.shape)}")
    if input.dim() != 4:
        raise ValueError(f"input: expected [B, C, H, W], got shape {list(input.shape)}")
    tasks = checked_tasks(weight, deltas, scores, gates)
    check_ids(task_ids, len(tasks.deltas), input.shape[0], "input")
    transformed = reference.transformed(input, weight, bias, task_ids, *tasks.deltas, *tasks.scores)
    if C is None or transformed:
        check_values(task_ids, len(tasks.deltas))
        known: dict[str, Any] = {"gates": gates, "threshold": threshold}
        arguments = (task_ids, bias, stride, padding, dilation, groups)
        return reference.mixed_conv2d(input, weight, tasks.deltas, tasks.scores, *arguments, **known)
    steps, spread = two(stride), two(dilation)
    pad, ahead = symmetric_padding(padding, weight, steps, spread)
    if ahead is not None:
        input = F.pad(input, ahead)
    geometry = Geometry(steps, pad, spread, groups)
    training = wants_gradient(input, weight, bias, *tasks.deltas, *tasks.scores)
    if is_compiling():
        deltas, scores, known_gates = filled(tasks, weight) if training else tasks
        rest = (*geometry, known_gates, threshold, training)
        return torch.ops.taps_ext.mixed_conv2d(input, weight, deltas, scores, task_ids, bias, *rest)
    if training:
        settings = (tasks.gates, threshold, geometry)
        return MixedConv2d.apply(settings, input, weight, bias, task_ids, *tasks.deltas, *tasks.scores)
    return product(input, weight, bias, task_ids, tasks, geometry, threshold, False)


def product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor,
    tasks: Tasks,
    geometry: Geometry,
    threshold: float,
    training: bool,
) -> Tensor:
    """The layer without autograd."""
    deltas, scores, gates = tasks
    with below_autograd():
        return torch.ops.taps_ext.mixed_conv2d.default(
            input, weight, deltas, scores, task_ids, bias, *geometry, gates, threshold, training
        )


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight, task_ids, deltas, scores = kept(ctx)
    geometry, input_size = ctx.geometry
    arguments = (input_size, weight, deltas, scores, task_ids, *geometry, ctx.gates, ctx.threshold, *ctx.wanted)
    run = torch.ops.taps_ext.mixed_conv2d_backward.default
    if torch._C._is_any_autocast_enabled():  # a backward may run inside a region of autocast, whose types are forwards'
        with torch.autocast(grad_output.device.type, enabled=False):
            return in_order(ctx, run(grad_output, input, *arguments))
    return in_order(ctx, run(grad_output, input, *arguments))


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    dinput, dweight, dbias, ddeltas, dscores = _gradients(ctx, grad_output)
    return None, dinput, dweight, dbias, None, *ddeltas, *dscores


_refusing = once_differentiable(_backward)


class MixedConv2d(torch.autograd.Function):
    """The layer with a gradient, for eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: tuple[list[int], float, Geometry],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task_ids: Tensor,
        *of_tasks: Tensor | None,
    ) -> Tensor:
        gates, threshold, geometry = settings
        count = len(gates)
        tasks = Tasks(list(of_tasks[:count]), list(of_tasks[count:]), gates)
        output = product(input, weight, bias, task_ids, tasks, geometry, threshold, True)
        ctx.geometry = geometry, input.shape[-2:]
        _, dinput, dweight, dbias, _, *rest = ctx.needs_input_grad
        needs = dinput, dweight, dbias, rest[:count], rest[count:]
        keep(ctx, input, weight, bias, task_ids, tasks, threshold, needs, present(task_ids, count))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _refusing(ctx, grad_output) if torch.is_grad_enabled() else _backward(ctx, grad_output)


# ------------------------------------------------------------------------ for compiled graphs and direct users


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, deltas, scores, task_ids, bias, stride, padding, dilation, groups, gates, threshold, _ = inputs
    expect_tracked("mixed_conv2d", deltas, scores)
    ctx.geometry = Geometry(stride, padding, dilation, groups), tuple(input.shape[-2:])
    keep(
        ctx,
        input,
        weight,
        bias,
        task_ids,
        Tasks(deltas, scores, gates),
        threshold,
        (*learned([input, weight, bias]), learned(deltas), learned(scores)),
        [True] * len(deltas),
    )


def _operator_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    dinput, dweight, dbias, ddeltas, dscores = _gradients(ctx, grad_output)
    return dinput, dweight, ddeltas, dscores, None, dbias, *[None] * 7


def _fake(
    input: Tensor,
    weight: Tensor,
    deltas: Any,
    scores: Any,
    task_ids: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    gates: Any,
    threshold: float,
    training: bool = False,
) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight.to(input.dtype), bias, stride, padding, dilation, groups)


def _fake_backward(
    grad_output: Tensor,
    input: Any,
    input_size: Any,
    weight: Tensor,
    deltas: Any,
    scores: Any,
    task_ids: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    gates: Any,
    threshold: float,
    input_bias_weight: list[bool],
    delta_mask: list[bool],
    score_mask: list[bool],
) -> tuple[Any, ...]:
    dinput = None
    if input_bias_weight[0]:
        geometry = Geometry(stride, padding, dilation, groups)
        dinput = data_gradient_like(grad_output, input, input_size, weight, geometry)
    return mixed_gradients(dinput, grad_output, weight, deltas, scores, input_bias_weight, delta_mask, score_mask)


if C is not None:
    register_fake("mixed_conv2d", _fake)
    register_fake("mixed_conv2d_backward", _fake_backward)
    register_autograd("mixed_conv2d", _setup, _operator_backward)
