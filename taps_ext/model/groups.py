"""Optimizer groups of a task's parameters, by what they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..methods.base import number
from .state import Parts, TaskState


def parameter_groups(
    states: Iterable[TaskState], *, lr: float, score_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """See `TaskModel.parameter_groups`. A layer's own weight counts as "other": decay would pull it to zero."""
    given: dict[str, Any] = {"lr": lr, "score_lr": lr if score_lr is None else score_lr, "weight_decay": weight_decay}
    for argument, value in given.items():  # a rate may be a tensor of one element, as torch's optimizers take it
        number(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value, argument, 0.0)
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in ("delta", "score", "norm", "other", "head")}
    every: list[Parts] = []
    for state in states:
        every += [held for held in (state.family, state) if held is not None and held not in every]
    for held in every:
        for part in held.table.values():
            for role, parameters in part.roles().items():
                groups["other" if role in ("weight", "bias") else role] += parameters
    result = []
    for key, parameters in groups.items():
        trained = [p for p in parameters if p.requires_grad]
        if trained:
            rate = score_lr if key == "score" and score_lr is not None else lr
            decay = weight_decay if key in ("delta", "head") else 0.0
            result.append({"name": key, "params": trained, "lr": rate, "weight_decay": decay})
    return result
