"""A loss and a metric of models that classify every token: means over the tokens that have a label."""

from __future__ import annotations

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


def token_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of the targets other than -100 that are the largest output, in [0, 1]; 0 where there are none.

    Args:
        outputs: `[B, ..., C]`, classes last. targets: `[B, ...]`.

    Raises:
        ConfigError: other shapes.
    """
    _check(outputs, targets, "token_accuracy")
    kept = targets != IGNORED
    return ((outputs.argmax(-1) == targets) & kept).sum().item() / max(1, int(kept.sum()))


def count_of(function: Any, targets: Tensor) -> int:
    """How many values the mean of a loss or a metric over a batch is of: its samples, or its tokens that count."""
    if function in (token_cross_entropy, token_accuracy):
        return int((targets != IGNORED).sum())
    return len(targets)
