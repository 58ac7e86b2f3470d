"""One forward for the batches of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.outputs import predictions


def together(inputs: Mapping[str, Any], dim: int = 0) -> tuple[Any, list[str]] | None:
    """Batches of several tasks as one, and whose each of its samples is; None where their samples are not alike. `dim`:
    that of samples."""
    batches = list(inputs.values())
    if all(isinstance(batch, Tensor) for batch in batches):
        if any(batch.dim() <= dim for batch in batches):
            return None
        if len({(batch.shape[:dim], batch.shape[dim + 1 :], batch.dtype, batch.device) for batch in batches}) != 1:
            return None
        return torch.cat(batches, dim), [name for name, batch in inputs.items() for _ in range(batch.shape[dim])]
    if not all(isinstance(batch, Mapping) and batch.keys() == batches[0].keys() for batch in batches):
        return None
    made, names = {}, None
    for key in batches[0]:
        joined = together({name: batch[key] for name, batch in inputs.items()}, dim)
        if joined is None or (names is not None and names != joined[1]):
            return None
        made[key], names = joined
    return None if names is None else (made, names)


def mixed_outputs_of(model: nn.Module, inputs: Any, tasks: list[str], device: torch.device) -> dict[str, Any]:
    """What the losses of several tasks see of one forward on a batch of :func:`together`."""
    if isinstance(inputs, Mapping):
        out = model(**{key: value.to(device) for key, value in inputs.items()}, tasks=tasks)
    else:
        out = model(inputs.to(device), tasks=tasks)
    return {name: predictions(output) for name, (_, output) in out.items()}
