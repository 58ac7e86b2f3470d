"""Losses of maps: means over the pixels that count. Outputs are `[B, n, H, W]` logits or values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

IGNORED = 255
"""The label of a pixel that counts for nothing; of maps of values it is NaN."""


def one_channel(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """`[B, H, W]` of outputs `[B, 1, H, W]`. Raises ConfigError for other shapes than the targets'."""
    if outputs.dim() != 4 or outputs.shape[1] != 1 or outputs[:, 0].shape != targets.shape:
        raise ConfigError(
            f"{name}: expected outputs [B, 1, H, W] for targets [B, H, W], got {list(outputs.shape)} and "
            f"{list(targets.shape)}"
        )
    return outputs[:, 0]


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of the values that count, 0 (with a gradient of 0) where none does; what does not count has no say,
    whatever it is."""
    return torch.where(counts, values, values.new_zeros(())).sum() / counts.sum().clamp(min=1)


def _wide(outputs: Tensor) -> Tensor:
    """Outputs of 16 bits as float32: a sum over pixels would pass what float16 holds."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


class SegmentationLoss:
    """Cross-entropy of class labels int64 `[B, H, W]`.

    Args:
        ignore: the label of pixels that do not count. weights: one for each class, which the mean weighs pixels by.
    """

    def __init__(self, ignore: int = IGNORED, weights: Sequence[float] | None = None) -> None:
        if weights is not None and (not len(weights) or not all(0 <= float(one) < float("inf") for one in weights)):
            raise ConfigError(f"weights: expected finite numbers >= 0, one for each class, got {weights!r}")
        self.ignore, self.weights = ignore, None if weights is None else [float(one) for one in weights]

    def _weights(self, like: Tensor, dtype: torch.dtype) -> Tensor | None:
        return None if self.weights is None else torch.tensor(self.weights, device=like.device, dtype=dtype)

    def counts(self, targets: Tensor) -> float:
        """What the mean is taken over: pixels, or their weights."""
        kept = targets[targets != self.ignore]
        weights = self._weights(targets, torch.float64)
        return float(kept.numel() if weights is None else weights[kept].sum())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() != 4 or outputs[:, 0].shape != targets.shape:
            raise ConfigError(
                f"segmentation: expected outputs [B, C, H, W] for targets [B, H, W], got {list(outputs.shape)} and "
                f"{list(targets.shape)}"
            )
        if self.weights is not None and len(self.weights) != outputs.shape[1]:
            raise ConfigError(f"weights: expected {outputs.shape[1]}, one for each class, got {len(self.weights)}")
        outputs = _wide(outputs)
        weights = self._weights(outputs, outputs.dtype)
        total = F.cross_entropy(outputs, targets, weight=weights, ignore_index=self.ignore, reduction="sum")
        kept = targets != self.ignore
        # Weighed by its label, or by one; of labels that are ignored the weight of any class will do.
        weighed = kept.sum() if weights is None else (weights[targets.masked_fill(~kept, 0)] * kept).sum()
        return total / torch.where(weighed > 0, weighed, 1)


class BalancedLoss:
    """Weighted binary cross-entropy of labels 0 and 1 `[B, H, W]`: `w` for ones, `1 - w` for zeros.

    Args:
        weight: w; None takes the share of zeros among the batch's pixels that count, as HED (arXiv 1504.06375) does.
            MTLoRA has 0.95 for edges.
        ignore: the label of pixels that do not count.
    """

    def __init__(self, weight: float | None = None, ignore: int = IGNORED) -> None:
        if weight is not None and not 0 <= weight <= 1:
            raise ConfigError(f"weight: expected a number from 0 to 1, got {weight!r}")
        self.weight, self.ignore = weight, ignore

    def counts(self, targets: Tensor) -> float:
        """Pixels that the mean is taken over."""
        return float((targets != self.ignore).sum())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(one_channel(outputs, targets, "balanced loss"))
        counts, ones = targets != self.ignore, targets == 1
        if self.weight is None:
            weight = (counts & ~ones).sum() / counts.sum().clamp(min=1)
        else:
            weight = torch.tensor(self.weight, device=logits.device, dtype=torch.float64)
        weight = weight.to(logits.dtype)
        # -log sigmoid(x) of a one, -log sigmoid(-x) of a zero
        values = torch.where(ones, weight * F.softplus(-logits), (1 - weight) * F.softplus(logits))
        return _mean(values, counts)


class ValueLoss:
    """Mean absolute difference of values `[B, H, W]` (depth, distance); pixels whose target is not finite do not
    count."""

    def counts(self, targets: Tensor) -> float:
        """Pixels that the mean is taken over."""
        return float(targets.isfinite().sum())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found, counts = one_channel(outputs, targets, "value loss"), targets.isfinite()
        return _mean((found - targets.nan_to_num(0, 0, 0)).abs(), counts)


class NormalsLoss:
    """Mean absolute difference, over pixels and components, of outputs `[B, 3, H, W]` divided by their length to unit
    normals of that shape; pixels with a component that is not finite do not count."""

    def counts(self, targets: Tensor) -> float:
        """Pixels that the mean is taken over."""
        return float(targets.isfinite().all(1).sum())

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_normals(outputs, targets)
        difference = (F.normalize(outputs, dim=1) - targets.nan_to_num(0, 0, 0)).abs().mean(1)
        return _mean(difference, targets.isfinite().all(1))


def check_normals(outputs: Tensor, targets: Tensor) -> None:
    """Raise ConfigError unless both are `[B, 3, H, W]`."""
    if outputs.dim() != 4 or outputs.shape[1] != 3 or outputs.shape != targets.shape:
        raise ConfigError(
            f"normals: expected outputs and targets [B, 3, H, W], got {list(outputs.shape)} and {list(targets.shape)}"
        )
