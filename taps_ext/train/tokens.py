"""A loss and a metric of models that classify every token: means over the tokens that have a label."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

IGNORED = -100
"""The target of what counts for nothing, as in `F.cross_entropy` and transformers' collators."""


def _check(outputs: Any, targets: Tensor, who: str) -> None:
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or outputs.shape[:-1] != targets.shape:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigError(f"{who}: expected outputs [B, ..., C] for targets {list(targets.shape)}, got {got}")


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, a mean over all targets that are not -100; 0 where there are none.

    Args:
        outputs: `[B, ..., C]`, classes last, as transformers' token classifiers give them. targets: `[B, ...]` int64.

    Raises:
        ConfigError: other shapes.
    """
    _check(outputs, targets, "token_cross_entropy")
    flat = targets.reshape(-1)
    loss = F.cross_entropy(outputs.reshape(len(flat), -1), flat, ignore_index=IGNORED, reduction="sum")
    return loss / (flat != IGNORED).sum().clamp(min=1)


def token_hits(outputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """How many targets are the largest output, and how many count: all but those of -100. Raises as
    :func:`token_accuracy`."""
    _check(outputs, targets, "token_accuracy")
    kept = targets != IGNORED
    return int(((outputs.argmax(-1) == targets) & kept).sum()), int(kept.sum())


def token_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of the targets other than -100 that are the largest output, in [0, 1]; nan where there are none. Over a
    split the Trainer counts targets, as it does for `accuracy`.

    Args:
        outputs: `[B, ..., C]`, classes last. targets: `[B, ...]`.

    Raises:
        ConfigError: other shapes.
    """
    right, counted = token_hits(outputs, targets)
    return right / counted if counted else math.nan
