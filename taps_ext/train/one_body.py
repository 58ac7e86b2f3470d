"""Several tasks on the same images: one run of the backbone for all, where their outputs differ by their decoders alone
or their method serves them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..dense import DenseBase
from ..model import TaskModel
from ..model.outputs import predictions
from ..model.passes import share_a_pass
from ..model.state import TaskState

Whole = tuple[Any, list[int]]
"""Inputs, and which of their samples are a task's."""


def same_samples(wholes: Mapping[str, Whole | None]) -> TypeGuard[Mapping[str, Whole]]:
    """Whether several tasks' batches are of the same inputs, which were read once for them."""
    found = list(wholes.values())
    first = found[0] if found else None
    return (
        len(found) > 1
        and first is not None
        and isinstance(first[0], Tensor)
        and all(one is not None and one[0] is first[0] for one in found)
    )


def bodies_alike(model: TaskModel, states: Mapping[str, TaskState]) -> bool:
    """Whether tasks of a :class:`DenseBase` have nothing below their decoders but what is the base's, or what closed
    gates that nothing learns leave as it is. Then a sample's features are the same for all, whatever the batch is."""
    if not isinstance(model.base, DenseBase):
        return False
    for state in states.values():
        below = [part for name, part in state.table.items() if name != state.head_path]
        if state.family is not None or any(not part.idle() or any(True for _ in part.parameters()) for part in below):
            return False
    return True


def outputs_of_all(
    model: TaskModel, wholes: Mapping[str, Whole | None], states: Mapping[str, TaskState], device: torch.device
) -> dict[str, Any] | None:
    """What each task makes of its samples, of which the backbone sees each once; None where it has to see them more
    often.

    Tasks with decoders alone share features whichever samples they have. Those of a family that a method serves
    together (MTLoRA) share a pass where each has all samples: others would be in the batch statistics of its decoder.
    """
    if not same_samples(wholes):
        return None
    if bodies_alike(model, states):
        return outputs_over_one_body(model, wholes, device)
    names = list(wholes)
    inputs = wholes[names[0]][0]
    if all(len(rows) == len(inputs) for _, rows in wholes.values()) and share_a_pass(model, names):
        return {name: predictions(out) for name, out in model.forward_tasks(inputs.to(device), tasks=names).items()}
    return None


def outputs_over_one_body(model: TaskModel, wholes: Mapping[str, Whole], device: torch.device) -> dict[str, Any]:
    """What each task makes of its samples, of which the backbone sees each once.

    The features are of the first task, whose are those of all (:func:`bodies_alike`).
    """
    names = list(wholes)
    inputs = wholes[names[0]][0].to(device)
    size = inputs.shape[2], inputs.shape[3]
    maps = model.features(inputs, task=names[0])
    found = {}
    for name in names:
        rows = wholes[name][1]
        own = maps
        if len(rows) < len(inputs):
            index = torch.tensor(rows, device=device)
            own = [one.index_select(0, index) for one in maps]
        found[name] = model.decode(own, size, task=name)
    return found
