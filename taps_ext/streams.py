"""Streams: what some tasks make of one image beside what they share, and how features tell of them.

A forward with task streams (MTLoRA, arXiv 2403.20320) hands the shared stream from module to module. What tasks made of
the same features lies in the leading dimension of a tensor that the shared one remembers: who collects features asks
`of` for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedModuleError

_KEPT = "_taps_streams"


def attach(shared: Tensor, wide: Tensor, tasks: int) -> Tensor:
    """Let `shared` remember its streams, and return it.

    Args:
        wide: `[(1 + tasks) * B, ...]`: the rows of the shared stream, then those of each task.
    """
    setattr(shared, _KEPT, (wide, tasks))
    return shared


def wide_of(shared: Any) -> tuple[Tensor, int] | None:
    """What `attach` was given for a tensor, or None.

    Raises:
        UnsupportedModuleError: the streams have no gradient where the tensor has one.
    """
    found: tuple[Tensor, int] | None = getattr(shared, _KEPT, None)
    if found is not None and torch.is_grad_enabled() and shared.requires_grad and not found[0].requires_grad:
        raise UnsupportedModuleError(
            "task streams: reentrant activation checkpointing hands on the shared stream alone, so that tasks would "
            "learn nothing from these features; use use_reentrant=False"
        )
    return found


def of(feature: Tensor) -> Tensor:
    """The rows that tasks have of a feature, `[tasks * B, ...]`, task after task: of a feature `[B, ...]` with streams
    those; any other feature is the same for all tasks, and is returned as it is."""
    found = wide_of(feature)
    if found is None:
        return feature
    wide, tasks = found
    rows = wide.shape[0] // (1 + tasks)
    return wide.narrow(0, rows, tasks * rows)
