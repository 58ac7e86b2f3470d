"""The low-rank part of a mixed batch, of LoRA (arXiv 2106.09685): signature, autograd, fakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import reference
from ..extension import C
from .call import autocast_dtype, below_autograd, register_autograd
from .fakes import empty, gradient_like, register_fake
from .mixed_call import check_ids, check_values, expect_tracked, learned, listed, present, wants_gradient
from .once import once_differentiable


def mixed_lowrank(
    input: Tensor,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    task_ids: Tensor,
    scales: Sequence[float],
) -> Tensor:
    """`scales[t] * (x a[t]^T) b[t]^T` for each row x of task t: what LoRA (arXiv 2106.09685, equation 3) adds to the
    base's product, for a batch whose samples belong to many tasks.

    Args:
        input: `[..., K]`, rows of samples as in :func:`mixed_linear`.
        a: for each of T tasks `[r_t, K]`, or None; ranks may differ.
        b: for each task `[N, r_t]`, None where `a` has none. Both are taken in the compute dtype.
        task_ids: `[B]`, int64, on the input's device: 0 to T - 1, or -1 for the base.
        scales: for each task a number.

    Returns:
        `[..., N]` in the compute dtype: zeros for rows of the base, and of tasks without factors. A task without
        samples gets no gradient where the ids are on a CPU, else zeros.

    Raises:
        ValueError: shapes that do not fit, lists of different lengths, factors of no task, ids of no task where the
            host can see them.
        TypeError: an argument of another kind; factors of another dtype than the input's outside autocast.
        RuntimeError: what the kernels find: ids of no task, devices.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
    downs = listed(a, "a")
    ups, factors = listed(b, "b", len(downs)), listed(scales, "scales", len(downs))
    kind = autocast_dtype(input)
    if kind is not None:
        input = input.to(kind)
    outputs: int | None = None
    for task, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if (down is None) != (up is None):
            raise ValueError(f"b[{task}]: expected a tensor where a has one, and None where it has none")
        if down is None:
            continue
        for name, factor in (("a", down), ("b", up)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"{name}[{task}]: expected a tensor or None, got {type(factor).__name__}")
            if factor.dtype != input.dtype and kind is None:
                raise TypeError(f"{name}[{task}]: expected dtype {input.dtype} like input, got {factor.dtype}")
        outputs = up.shape[0] if outputs is None else outputs
        if down.dim() != 2 or down.shape[1] != input.shape[-1]:
            raise ValueError(f"a[{task}]: expected shape [r, {input.shape[-1]}], got {list(down.shape)}")
        if up.shape != (outputs, down.shape[0]):
            raise ValueError(f"b[{task}]: expected shape {[outputs, down.shape[0]]}, got {list(up.shape)}")
        downs[task], ups[task] = down.to(input.dtype), up.to(input.dtype)
    if outputs is None:
        raise ValueError("b: expected a tensor for one task at least, got None for all")
    check_ids(task_ids, len(downs), input.shape[:-1].numel(), "input")
    if C is None or reference.transformed(input, task_ids, *downs, *ups):
        check_values(task_ids, len(downs))
        return reference.mixed_lowrank(input, downs, ups, task_ids, factors)
    training = wants_gradient(input, *downs, *ups)
    if is_compiling():
        if training:  # torch's autograd of operators does not know a None in lists
            downs = [input.new_empty([0, input.shape[-1]]) if down is None else down for down in downs]
            ups = [input.new_empty([outputs, 0]) if up is None else up for up in ups]
        return torch.ops.taps_ext.mixed_lowrank(input, downs, ups, task_ids, factors)
    if training:
        return MixedLowRank.apply(factors, input, task_ids, *downs, *ups)
    return product(input, downs, ups, task_ids, factors)


def product(
    input: Tensor, a: list[Tensor | None], b: list[Tensor | None], task_ids: Tensor, scales: list[float]
) -> Tensor:
    """The products without autograd."""
    with below_autograd():
        return torch.ops.taps_ext.mixed_lowrank.default(input, a, b, task_ids, scales)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    input, task_ids, *rest = ctx.saved_tensors
    count = len(rest) // 2
    of_input, of_a, of_b = ctx.wanted
    dinput, da, db = torch.ops.taps_ext.mixed_lowrank_backward.default(
        grad_output, input, rest[:count], rest[count:], task_ids, ctx.scales, of_input, of_a, of_b
    )
    return (
        dinput if of_input else None,
        [grad if asked else None for grad, asked in zip(da, of_a, strict=True)],
        [grad if asked else None for grad, asked in zip(db, of_b, strict=True)],
    )


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    dinput, da, db = _gradients(ctx, grad_output)
    return None, dinput, None, *da, *db


_refusing = once_differentiable(_backward)


class MixedLowRank(torch.autograd.Function):
    """The products with a gradient, for eager calls. They are small: backward does them again, and keeps what came."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], input: Tensor, task_ids: Tensor, *factors: Tensor | None) -> Tensor:
        count = len(scales)
        a, b = list(factors[:count]), list(factors[count:])
        output = product(input, a, b, task_ids, scales)
        there = present(task_ids, count)
        _, of_input, _, *rest = ctx.needs_input_grad
        masks = [[n and t for n, t in zip(part, there, strict=True)] for part in (rest[:count], rest[count:])]
        ctx.scales, ctx.wanted = scales, (of_input, *masks)
        ctx.save_for_backward(input, task_ids, *a, *b)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _refusing(ctx, grad_output) if torch.is_grad_enabled() else _backward(ctx, grad_output)


# ------------------------------------------------------------------------ for compiled graphs and direct users


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, a, b, task_ids, scales = inputs
    expect_tracked("mixed_lowrank", a, b)
    ctx.scales, ctx.wanted = scales, (input.requires_grad, learned(a), learned(b))
    ctx.save_for_backward(input, task_ids, *a, *b)


def _operator_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return *_gradients(ctx, grad_output), None, None


def _fake(input: Tensor, a: Any, b: Any, task_ids: Tensor, scales: Any) -> Tensor:
    return input.new_empty([*input.shape[:-1], next(up.shape[0] for up in b if up is not None)])


def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    a: Any,
    b: Any,
    task_ids: Tensor,
    scales: Any,
    input_mask: bool,
    a_mask: list[bool],
    b_mask: list[bool],
) -> tuple[Any, ...]:
    return (
        input.new_empty(input.shape) if input_mask else empty(input),
        [gradient_like(one) if asked else empty(input) for one, asked in zip(a, a_mask, strict=True)],
        [gradient_like(one) if asked else empty(input) for one, asked in zip(b, b_mask, strict=True)],
    )


if C is not None:
    register_fake("mixed_lowrank", _fake)
    register_fake("mixed_lowrank_backward", _fake_backward)
    register_autograd("mixed_lowrank", _setup, _operator_backward)
