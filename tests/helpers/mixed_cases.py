"""Mixed batches of every make, and the loop over tasks that they must equal."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taps_ext import gated_conv2d, gated_linear


class Batch(NamedTuple):
    """The arguments of a mixed layer."""

    input: Tensor
    weight: Tensor
    deltas: list[Tensor | None]
    scores: list[Tensor | None]
    task_ids: Tensor
    bias: Tensor | None
    gates: list[bool | None]

    def leaves(self) -> list[Tensor]:
        """All that may have a gradient."""
        tensors = [self.input, self.weight, self.bias, *self.deltas, *self.scores]
        return [tensor for tensor in tensors if tensor is not None]

    def detached(self, *, grad: bool = True, double: bool = False) -> Batch:
        """A copy whose tensors are leaves; in float64 where asked."""

        def leaf(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            own = tensor.detach().clone(memory_format=torch.preserve_format)
            return (own.double() if double else own).requires_grad_(grad)

        deltas, scores = [leaf(d) for d in self.deltas], [leaf(s) for s in self.scores]
        return self._replace(
            input=leaf(self.input), weight=leaf(self.weight), deltas=deltas, scores=scores, bias=leaf(self.bias)
        )


def _tasks(
    chance: random.Random, count: int, shape: list[int], make: Callable[[list[int]], Tensor], kind: torch.dtype
) -> tuple[list[Tensor | None], list[Tensor | None], list[bool | None]]:
    deltas: list[Tensor | None] = []
    scores: list[Tensor | None] = []
    gates: list[bool | None] = []
    for _ in range(count):
        open_or_not = chance.random() < 0.6
        deltas.append(None if chance.random() < 0.15 else make(shape).to(kind))
        score = torch.tensor(0.5 if open_or_not else 0.01, dtype=torch.float64 if kind == torch.float64 else None)
        known = chance.random() < 0.7
        scores.append(None if known and chance.random() < 0.2 else score.reshape(chance.choice([[], [1]])))
        gates.append(open_or_not if known else None)
    return deltas, scores, gates


def _ids(chance: random.Random, samples: int, tasks: int) -> Tensor:
    some = [task for task in range(-1, tasks) if task < 0 or chance.random() < 0.8]  # the others are absent
    ids = [chance.choice(some) for _ in range(samples)]
    return torch.tensor(sorted(ids) if chance.random() < 0.3 else ids, dtype=torch.int64)


def linear_batch(seed: int, kind: torch.dtype, delta_kind: torch.dtype | None = None) -> Batch:
    """One drawn from a seed: sizes, leading dimensions, order, absent, closed and base tasks."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    samples, tasks = chance.choice([0, 1, 2, 5, 9, 17]), chance.choice([0, 1, 2, 3, 7])
    n, k = chance.choice([1, 3, 16, 33, 70]), chance.choice([1, 4, 17, 64, 96])
    per = chance.choice([1, 1, 2, 5, 30])
    leading = chance.choice([[samples, per], [samples * per], [samples, 1, per]] if per > 1 else [[samples]])

    def make(shape: list[int]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x = make([*leading, k]).to(kind)
    if chance.random() < 0.2:
        x = torch.cat((x, x), -1)[..., :k]  # rows apart
    deltas, scores, gates = _tasks(chance, tasks, [n, k], make, delta_kind or kind)
    bias = make([n]).to(kind) if chance.random() < 0.6 else None
    return Batch(x, make([n, k]).to(kind), deltas, scores, _ids(chance, samples, tasks), bias, gates)


def conv2d_batch(seed: int, kind: torch.dtype) -> tuple[Batch, dict[str, Any]]:
    """The same of images, with the geometry."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    samples, tasks, per = chance.choice([0, 1, 2, 5, 9]), chance.choice([1, 2, 4]), chance.choice([1, 1, 3])
    groups = chance.choice([1, 1, 2, 4])
    o, c = 4 * chance.choice([1, 2, 4]), chance.choice([1, 2, 4])
    kernel = [chance.choice([1, 3]), chance.choice([1, 2])]
    geometry = {
        "stride": chance.choice([1, 2, (2, 1)]),
        "padding": chance.choice([0, 1, (1, 2)]),
        "dilation": chance.choice([1, 1, 2]),
        "groups": groups,
    }

    def make(shape: list[int]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    last = chance.random() < 0.4
    x, weight = make([samples * per, c * groups, 6, 7]).to(kind), make([o, c, *kernel]).to(kind)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    deltas, scores, gates = _tasks(chance, tasks, [o, c, *kernel], make, kind)
    bias = make([o]).to(kind) if chance.random() < 0.6 else None
    return Batch(x, weight, deltas, scores, _ids(chance, samples, tasks), bias, gates), geometry


def looped(batch: Batch, layer: Callable[..., Tensor] | None = None, **geometry: Any) -> Tensor:
    """Task by task, each by the gated layer; what a mixed layer must equal."""
    images = batch.weight.dim() == 4
    run = layer or (gated_conv2d if images else gated_linear)
    rows = batch.input if images else batch.input.reshape(-1, batch.input.shape[-1])
    count = batch.task_ids.numel()
    ids = batch.task_ids.repeat_interleave(rows.shape[0] // count if count else 0)
    empty = run(rows[:0], batch.weight, None, None, batch.bias, **geometry)
    output = empty.new_zeros([rows.shape[0], *empty.shape[1:]])
    for task in range(-1, len(batch.deltas)):
        at = (ids == task).nonzero().flatten()
        if at.numel():
            delta, score, gate = (
                (None, None, False)
                if task < 0 or batch.deltas[task] is None
                else (batch.deltas[task], batch.scores[task], batch.gates[task])
            )
            part = run(rows[at], batch.weight, delta, score, batch.bias, gate=gate, **geometry)
            output = output.index_copy(0, at, part)
    return output if images else output.reshape(*batch.input.shape[:-1], batch.weight.shape[0])
