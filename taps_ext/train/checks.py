"""What a task's data must be: said before training, or in the step that first sees otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

_IGNORED = -100  # what F.cross_entropy leaves out


def check_sample(data: Any, argument: str) -> None:
    """Raise ConfigError unless the first item of a dataset is a pair of an input tensor and a target."""
    item = data[0]
    if isinstance(item, Mapping):
        raise ConfigError(f"{argument}: expected items (input, target), got dictionaries with keys {list(item)}")
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"{len(item)} values" if isinstance(item, (tuple, list)) else type(item).__name__
        raise ConfigError(f"{argument}: expected items (input, target), got {got}")
    inputs, target = item
    if not isinstance(inputs, (Tensor, np.ndarray)):
        kind = f"{type(inputs).__module__.split('.')[0]} {type(inputs).__name__}"
        raise ConfigError(
            f"{argument}: expected a tensor as the input of an item, got {kind}; give the dataset a transform"
        )
    if not isinstance(target, (Tensor, np.ndarray, np.generic, int, float)):
        raise ConfigError(f"{argument}: expected a number or tensor as the target of an item, got {target!r}")


def check_targets(loss: Any, targets: Tensor, outputs: int | None, argument: str) -> None:
    """Raise ConfigError unless `F.cross_entropy` takes these targets for `outputs` classes (None: not known)."""
    if loss is not F.cross_entropy or outputs is None or targets.is_cuda:
        return
    if targets.is_floating_point():
        if targets.dim() != 2 or targets.shape[1] != outputs:
            got = f"{targets.dtype} {list(targets.shape)}"
            raise ConfigError(f"{argument}: expected int64 labels [B] or probabilities [B, {outputs}], got {got}")
        return
    if targets.dtype != torch.int64 or targets.dim() != 1:
        raise ConfigError(f"{argument}: expected int64 labels [B], got {targets.dtype} {list(targets.shape)}")
    kept = targets[targets != _IGNORED]
    if len(kept) and (int(kept.max()) >= outputs or int(kept.min()) < 0):
        wrong = int(kept.max()) if int(kept.max()) >= outputs else int(kept.min())
        raise ConfigError(f"{argument}: expected labels from 0 to {outputs - 1} (the head), got {wrong}")
