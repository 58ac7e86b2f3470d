"""One batch of many tasks: the forward, and each request's own share of what it gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from ..model import TaskModel


def run(
    model: TaskModel, inputs: Sequence[Tensor], names: Sequence[str | None], device: torch.device, most: int
) -> list[Any]:
    """What each of several inputs `[N_i, ...]` of equal shape and type gives under its task: outputs of N_i rows each.

    Args:
        most: samples of a forward; only a single input may have more, and then runs in pieces.
    """
    if len(inputs) == 1 and len(inputs[0]) > most:
        pieces = [run(model, [piece], names, device, most)[0] for piece in inputs[0].split(most)]
        return [_joined(pieces)]
    order = sorted(range(len(inputs)), key=lambda i: names[i] or "")  # a task's rows that lie together are not copied
    x = torch.cat([inputs[i] for i in order]) if len(order) > 1 else inputs[0]
    each = [names[i] for i in order for _ in range(len(inputs[i]))]
    with torch.no_grad():
        outputs = model(x.to(device), tasks=each)
    places = {name: {row: place for place, row in enumerate(rows.tolist())} for name, (rows, _) in outputs.items()}
    answers: list[Any] = [None] * len(inputs)
    begin = 0
    for i in order:
        name, end = names[i], begin + len(inputs[i])
        index = torch.tensor([places[name][row] for row in range(begin, end)])
        answers[i] = _rows(outputs[name][1], index, len(places[name]), inputs[i].device)
        begin = end
    return answers


def _rows(output: Any, index: Tensor, count: int, device: torch.device) -> Any:
    """Copies of these rows of all tensors that have a row for each of `count` samples: who keeps an answer keeps no
    other one's."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            return value.detach()[index.to(value.device)].to(device)
        return value

    return tree_map(pick, output)


def first(output: Any) -> Any:
    """The answer of a single sample without the dimension of the batch."""
    return tree_map(lambda value: value[0] if isinstance(value, Tensor) and value.dim() else value, output)


def _joined(pieces: Sequence[Any]) -> Any:
    def join(*parts: Any) -> Any:
        return torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]

    return tree_map(join, *pieces)
