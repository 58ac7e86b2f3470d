"""One batch of many tasks: the forward, and each request's own share of what it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from ..model import TaskModel


def _mixed(model: TaskModel, x: Tensor, names: Sequence[str | None]) -> Mapping[str | None, tuple[Tensor, Any]]:
    """By task: which rows of `x` are its own, in order, and what it makes of them. One task a row."""
    rows: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    found = {}
    for name, own in rows.items():
        index = torch.tensor(own, device=x.device)
        found[name] = index, model(x if len(rows) == 1 else x[index], task=name)
    return found


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
    x = torch.cat(list(inputs)) if len(inputs) > 1 else inputs[0]
    each = [name for name, input in zip(names, inputs, strict=True) for _ in range(len(input))]
    with torch.no_grad():
        outputs = _mixed(model, x.to(device), each)
    places = {name: {row: place for place, row in enumerate(found[0].tolist())} for name, found in outputs.items()}
    answers, begin = [], 0
    for name, input in zip(names, inputs, strict=True):
        index = torch.tensor([places[name][row] for row in range(begin, begin + len(input))])
        answers.append(_rows(outputs[name][1], index, len(places[name]), input.device))
        begin += len(input)
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
