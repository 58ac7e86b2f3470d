"""What the calls of mixed batches share: checks of arguments, and what autograd keeps between forward and backward.

The tensors of a call travel in one order, (input, weight, bias, task_ids, *deltas, *scores), the settings before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import reference
from .call import autocast_dtype
from .reconstruct import check_gate

KNOWN = {True: 1, False: 0, None: -1}  # a gate as the operators take it in lists


class Tasks(NamedTuple):
    """The tasks of a call, checked: T entries each; `gates` hold 1, 0, or -1 where the score is read."""

    deltas: list[Tensor | None]
    scores: list[Tensor | None]
    gates: list[int]


def check_ids(task_ids: Any, tasks: int, rows: int, name: str) -> None:
    """Raise where these cannot be the tasks of so many rows, samples of one behind the other.

    Their values are checked where they are read without waiting for a device: on a CPU.
    """
    if not isinstance(task_ids, Tensor):
        raise TypeError(f"task_ids: expected a tensor, got {type(task_ids).__name__}")
    if task_ids.dim() != 1 or task_ids.dtype != torch.int64:
        raise ValueError(f"task_ids: expected int64 of shape [B], got {task_ids.dtype} of {list(task_ids.shape)}")
    count = task_ids.shape[0]
    if rows % count if count else rows:
        raise ValueError(f"{name}: expected a multiple of the {count} task_ids in its leading dimensions, got {rows}")


def check_values(task_ids: Tensor, tasks: int) -> None:
    """Raise where an id on a CPU is that of no task; the operators look by themselves."""
    if (
        task_ids.device.type == "cpu"
        and not is_compiling()
        and task_ids.numel()
        and not reference.transformed(task_ids)
    ):
        least, most = (int(value) for value in task_ids.aminmax())
        if least < -1 or most >= tasks:
            wrong = least if least < -1 else most
            raise ValueError(f"task_ids: expected -1 for the base, or one of {tasks} tasks, got {wrong}")


def listed(value: Any, name: str, count: int | None = None) -> list[Any]:
    """The list of a sequence, of `count` entries."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple, got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name}: expected {count} entries, one for each task, got {len(value)}")
    return list(value)


def checked_tasks(
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None,
    gates: Sequence[bool | None] | None,
) -> Tasks:
    """The tasks of a call.

    Raises:
        TypeError: no list; an entry that is neither a tensor nor None; a gate that is no bool.
        ValueError: lists of different lengths; a Delta of another shape than the weight's; a score of more than one
            element; a Delta with neither score nor gate.
    """
    of_delta = listed(deltas, "deltas")
    count = len(of_delta)
    of_score = [None] * count if scores is None else listed(scores, "scores", count)
    known = [None] * count if gates is None else listed(gates, "gates", count)
    shape = weight.size()
    for task, (delta, score, gate) in enumerate(zip(of_delta, of_score, known, strict=True)):
        check_gate(gate, f"gates[{task}]")
        if delta is not None:
            if not isinstance(delta, Tensor):
                raise TypeError(f"deltas[{task}]: expected a tensor or None, got {type(delta).__name__}")
            if delta.size() != shape:
                raise ValueError(f"deltas[{task}]: expected shape {list(shape)} like weight, got {list(delta.shape)}")
            if gate is None and score is None:
                raise ValueError(f"scores[{task}]: expected a one-element tensor when its gate is None, got None")
        if score is not None:
            if not isinstance(score, Tensor):
                raise TypeError(f"scores[{task}]: expected a tensor or None, got {type(score).__name__}")
            if score.numel() != 1:
                raise ValueError(f"scores[{task}]: expected one element, got shape {list(score.shape)}")
    return Tasks(of_delta, of_score, [KNOWN[gate] for gate in known])


def checked_input(input: Any, weight: Any, bias: Any) -> Tensor:
    """The input in its compute type.

    Raises:
        TypeError: no tensor; input and weight of different dtypes outside autocast.
    """
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    dtype = autocast_dtype(input)
    if dtype is not None:
        return input.to(dtype)
    if input.dtype != weight.dtype:
        raise TypeError(f"input: expected dtype {weight.dtype} like weight (or autocast), got {input.dtype}")
    return input


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True where autograd is to record a call with these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def learned(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which of them ask for a gradient: of lists `needs_input_grad` says it in an operator's backward alone."""
    return [tensor is not None and tensor.requires_grad for tensor in tensors]


def filled(tasks: Tasks, weight: Tensor) -> Tasks:
    """Without a None, which torch's autograd of operators does not know in lists: a task that has no Delta is closed,
    its Delta, of which nothing is read, is W, and its score one that nothing asks a gradient of."""
    none: Tensor | None = None
    deltas, scores, gates = list(tasks.deltas), list(tasks.scores), list(tasks.gates)
    for task, delta in enumerate(deltas):
        if delta is None:
            deltas[task], scores[task], gates[task] = weight.detach(), None, 0
        if scores[task] is None:
            none = weight.new_zeros(1, dtype=torch.float32) if none is None else none
            scores[task] = none
    return Tasks(deltas, scores, gates)


def expect_tracked(name: str, *lists: Sequence[Tensor | None]) -> None:
    """Raise where torch would lose gradients of a list without a word: it takes one with a None for a constant."""
    for entries in lists:
        if None in [entry if entry is None else 0 for entry in entries] and any(
            entry is not None and entry.requires_grad for entry in entries
        ):
            raise RuntimeError(
                f"torch.ops.taps_ext.{name}: expected no None beside tensors that require gradients, which torch's "
                f"autograd loses; call taps_ext.{name}"
            )


# ---------------------------------------------------------------------------------- from forward to backward


class Wanted(NamedTuple):
    """Which gradients a backward operator gives."""

    of_layer: list[bool]  # input, bias, weight
    deltas: list[bool]
    scores: list[bool]


def present(task_ids: Tensor, tasks: int) -> list[bool]:
    """Which tasks have samples, as far as the host knows: all, where the ids are on a device or not yet known."""
    if is_compiling() or task_ids.device.type != "cpu" or type(task_ids) is not Tensor:
        return [True] * tasks
    found = set(task_ids.tolist())
    return [task in found for task in range(tasks)]


def keep(
    ctx: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    task_ids: Tensor,
    tasks: Tasks,
    threshold: float,
    needs: tuple[Any, ...],
    there: list[bool],
) -> None:
    """Keep what backward reads, never a W_t. `needs`: of (input, weight, bias, deltas, scores); `there`: which tasks
    have samples. Those that have none get no gradient, nor does the Delta of a gate known to be closed: it rests."""
    dinput, dweight, dbias, needs_deltas, needs_scores = needs
    each = list(zip(tasks.deltas, tasks.gates, there, strict=True))
    ddeltas = [n and is_there and gate != 0 for n, (_, gate, is_there) in zip(needs_deltas, each, strict=True)]
    dscores = [n and is_there and delta is not None for n, (delta, _, is_there) in zip(needs_scores, each, strict=True)]
    moved = [dinput and is_there and gate != 0 for _, gate, is_there in each]
    read = [any(uses) for uses in zip(ddeltas, dscores, moved, strict=True)]
    ctx.wanted = Wanted([dinput, dbias, dweight], ddeltas, dscores)
    ctx.gates, ctx.threshold = tasks.gates, threshold
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(
        input if dweight or any(ddeltas) or any(dscores) else None,
        weight,
        task_ids,
        *(delta if used else None for delta, used in zip(tasks.deltas, read, strict=True)),
        *(
            score if n or (gate < 0 and used) else None
            for score, n, gate, used in zip(tasks.scores, dscores, tasks.gates, read, strict=True)
        ),
    )


class Kept(NamedTuple):
    """What :func:`keep` kept."""

    input: Tensor | None
    weight: Tensor
    task_ids: Tensor
    deltas: list[Tensor | None]
    scores: list[Tensor | None]


def kept(ctx: Any) -> Kept:
    """What backward reads."""
    input, weight, task_ids, *rest = ctx.saved_tensors
    count = len(rest) // 2
    return Kept(input, weight, task_ids, rest[:count], rest[count:])


def in_order(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """A backward operator's results as (input, weight, bias, deltas, scores); what was not asked for is None."""
    dinput, dbias, dweight, ddeltas, dscores = grads
    wanted: Wanted = ctx.wanted
    of_input, of_bias, of_weight = wanted.of_layer
    return (
        dinput if of_input else None,
        dweight if of_weight else None,
        dbias.to(ctx.bias_dtype) if of_bias else None,
        [grad if asked else None for grad, asked in zip(ddeltas, wanted.deltas, strict=True)],
        [grad if asked else None for grad, asked in zip(dscores, wanted.scores, strict=True)],
    )
