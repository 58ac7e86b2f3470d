"""Streams: what some tasks make of one image beside what they share, and how features tell of them.

A forward with task streams (MTLoRA, arXiv 2403.20320) hands the shared stream from module to module. What tasks made of
the same features lies in the leading dimension of a tensor that the shared one remembers: who collects features asks
`of` for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModuleError

_KEPT = "_taps_streams"


def attach(shared: Tensor, rows: Tensor) -> Tensor:
    """Let `shared` `[B, ...]` remember its streams, and return it. `rows`: `[tasks * B, ...]`, task after task."""
    setattr(shared, _KEPT, rows)
    return shared


def found(shared: Any) -> Tensor | None:
    """The rows that `attach` was given for a tensor, or None.

    Raises:
        UnsupportedModuleError: they have no gradient where the tensor has one.
    """
    rows: Tensor | None = getattr(shared, _KEPT, None)
    if rows is not None and torch.is_grad_enabled() and shared.requires_grad and not rows.requires_grad:
        raise UnsupportedModuleError(
            "task streams: reentrant activation checkpointing hands on the shared stream alone, so that tasks would "
            "learn nothing from these features; use use_reentrant=False"
        )
    return rows


def copied(shared: Any) -> Any:
    """A copy of a tensor, with its streams; anything else as it is."""
    if not isinstance(shared, Tensor):
        return shared
    rows: Tensor | None = getattr(shared, _KEPT, None)
    return shared.clone() if rows is None else attach(shared.clone(), rows)


def of(feature: Any) -> Any:
    """The rows that tasks have of a feature `[B, ...]`, `[tasks * B, ...]`, task after task; a feature without streams
    is the same for all tasks, and is returned as it is."""
    rows = found(feature)
    return feature if rows is None else rows
