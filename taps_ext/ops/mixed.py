"""The linear layer of a mixed batch: signature, autograd, fakes. Its schema is in `csrc/ops.cpp`, its semantics in
`reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import reference
from ..extension import C
from .call import below_autograd, register_autograd
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


def mixed_linear(
    input: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None,
    task_ids: Tensor,
    bias: Tensor | None = None,
    *,
    gates: Sequence[bool | None] | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """Linear layer of a batch whose samples belong to many tasks, each on `W + g_t * Delta_t` (TAPS, arXiv 2203.16708,
    equation 2): every row is what :func:`gated_linear` gives for its own task.

    Args:
        input: `[B, ..., K]`, floating point, or with the samples' rows in any leading dimensions, sample after sample:
            of their product M, B must be a divisor, and row r belongs to sample `r // (M / B)`.
        weight: the frozen base weight W, `[N, K]`, in the input's dtype (any under autocast).
        deltas: for each of T tasks Delta, `[N, K]`, any floating dtype, or None where the task is the base here.
        scores: for each task one element or None, or None for all; a gate is open where `score >= threshold`. A score's
            gradient is <dL/dW_t, Delta>, also where closed.
        task_ids: `[B]`, int64, on the input's device, in any order: 0 to T - 1, or -1 for the base.
        bias: `[N]` or None.
        gates: for each task the gate as the host knows it, or None for all. None reads the score on its device, without
            synchronising.
        threshold: tau of the paper.

    Returns:
        `[..., N]` in the compute dtype. All rows of the base and of closed tasks are one product with W. A task without
        samples gets no gradient where the ids are on a CPU, else zeros. A Delta whose gate is False gets none: it
        rests.

    Raises:
        ValueError: shapes that do not fit, lists of different lengths, ids of no task where the host can see them; gate
            and score of a Delta both None.
        TypeError: input and weight of different dtypes outside autocast; an argument of another kind.
        RuntimeError: what the kernels find: ids of no task, dtypes, devices, the bias's and the input's last size; in
            backward on the CPU, a Delta with Inf or NaN in a closed layer whose score is trained.
    """
    input = checked_input(input, weight, bias)
    tasks = checked_tasks(weight, deltas, scores, gates)
    check_ids(task_ids, len(tasks.deltas), input.shape[:-1].numel(), "input")
    transformed = reference.transformed(input, weight, bias, task_ids, *tasks.deltas, *tasks.scores)
    if C is None or transformed:
        check_values(task_ids, len(tasks.deltas))
        known = {"gates": gates, "threshold": threshold}
        return reference.mixed_linear(input, weight, tasks.deltas, tasks.scores, task_ids, bias, **known)  # type: ignore[arg-type]
    training = wants_gradient(input, weight, bias, *tasks.deltas, *tasks.scores)
    if is_compiling():
        deltas, scores, known_gates = filled(tasks, weight) if training else tasks
        arguments = (task_ids, bias, known_gates, threshold, training)
        return torch.ops.taps_ext.mixed_linear(input, weight, deltas, scores, *arguments)
    if training:
        return MixedLinear.apply(tasks.gates, threshold, input, weight, bias, task_ids, *tasks.deltas, *tasks.scores)
    return product(input, weight, bias, task_ids, tasks, threshold, False)


def product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor,
    tasks: Tasks,
    threshold: float,
    training: bool,
) -> Tensor:
    """The layer without autograd."""
    deltas, scores, gates = tasks
    with below_autograd():
        return torch.ops.taps_ext.mixed_linear.default(
            input, weight, deltas, scores, task_ids, bias, gates, threshold, training
        )


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight, task_ids, deltas, scores = kept(ctx)
    grads = torch.ops.taps_ext.mixed_linear_backward.default(
        grad_output, input, weight, deltas, scores, task_ids, ctx.gates, ctx.threshold, *ctx.wanted
    )
    return in_order(ctx, grads)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    dinput, dweight, dbias, ddeltas, dscores = _gradients(ctx, grad_output)
    return None, None, dinput, dweight, dbias, None, *ddeltas, *dscores


_refusing = once_differentiable(_backward)


class MixedLinear(torch.autograd.Function):
    """The layer with a gradient, for eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: list[int],
        threshold: float,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task_ids: Tensor,
        *of_tasks: Tensor | None,
    ) -> Tensor:
        count = len(gates)
        tasks = Tasks(list(of_tasks[:count]), list(of_tasks[count:]), gates)
        output = product(input, weight, bias, task_ids, tasks, threshold, True)
        _, _, dinput, dweight, dbias, _, *rest = ctx.needs_input_grad
        needs = dinput, dweight, dbias, rest[:count], rest[count:]
        keep(ctx, input, weight, bias, task_ids, tasks, threshold, needs, present(task_ids, count))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return _refusing(ctx, grad_output) if torch.is_grad_enabled() else _backward(ctx, grad_output)


# ------------------------------------------------------------------------ for compiled graphs and direct users


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, deltas, scores, task_ids, bias, gates, threshold, _ = inputs
    expect_tracked("mixed_linear", deltas, scores)
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
    return dinput, dweight, ddeltas, dscores, None, dbias, None, None, None


def _fake(
    input: Tensor,
    weight: Tensor,
    deltas: Any,
    scores: Any,
    task_ids: Any,
    bias: Any,
    gates: Any,
    threshold: float,
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
    deltas: Any,
    scores: Any,
    task_ids: Any,
    gates: Any,
    threshold: float,
    input_bias_weight: list[bool],
    delta_mask: list[bool],
    score_mask: list[bool],
) -> tuple[Any, ...]:
    shape = [*grad_output.shape[:-1], weight.shape[1]]
    dinput = grad_output.new_empty(shape) if input_bias_weight[0] else None
    return mixed_gradients(dinput, grad_output, weight, deltas, scores, input_bias_weight, delta_mask, score_mask)


if C is not None:
    register_fake("mixed_linear", _fake)
    register_fake("mixed_linear_backward", _fake_backward)
    register_autograd("mixed_linear", _setup, _operator_backward)
