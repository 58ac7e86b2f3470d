"""Metrics of maps over a whole set: `update` with each batch, then `compute`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .losses import IGNORED, check_normals, one_channel


class MeanIoU:
    """Mean over classes of intersection over union, from the confusion counts of the whole set; classes that neither
    occur nor are predicted are left out.

    Args:
        classes: how many. ignore: the label of pixels that do not count.
    """

    def __init__(self, classes: int, ignore: int = IGNORED) -> None:
        self.classes, self.ignore = classes, ignore
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(self.classes, self.classes, dtype=torch.int64)  # [true, predicted]

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs: `[B, classes, H, W]`. targets: int64 `[B, H, W]`."""
        if outputs.dim() != 4 or outputs.shape[1] != self.classes or outputs[:, 0].shape != targets.shape:
            raise ConfigError(
                f"mIoU: expected outputs [B, {self.classes}, H, W] for targets [B, H, W], got {list(outputs.shape)} "
                f"and {list(targets.shape)}"
            )
        kept = targets != self.ignore
        pairs = targets[kept].long() * self.classes + outputs.argmax(1)[kept]
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes).cpu()

    def by_class(self) -> list[float]:
        """Intersection over union of each class, nan where it is in no map."""
        both = self.counts.diagonal().double()
        union = self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        found: list[float] = (both / union.double()).tolist()  # 0 / 0 is nan
        return found

    def compute(self) -> float:
        found = [one for one in self.by_class() if not math.isnan(one)]
        return sum(found) / len(found) if found else math.nan


class BoundaryF:
    """F measure of boundaries at the threshold that is best for the whole set.

    A predicted pixel is right if a true one is within `tolerance` rows and columns of it, a true one found if a
    predicted one is. Predictions are not thinned, and several may be right by one true pixel.

    Args:
        tolerance: in pixels. bins: thresholds `1 / bins, 2 / bins, ...` below 1 on probabilities. ignore: the label of
            pixels that do not count, neither as predicted nor as true.
    """

    def __init__(self, tolerance: int = 1, bins: int = 100, ignore: int = IGNORED) -> None:
        if type(tolerance) is not int or tolerance < 0 or type(bins) is not int or bins < 2:
            raise ConfigError(f"boundary F: expected tolerance >= 0 and bins >= 2, got {tolerance!r} and {bins!r}")
        self.tolerance, self.bins, self.ignore = tolerance, bins, ignore
        self.reset()

    def reset(self) -> None:
        # By the bin of a pixel's probability: predicted pixels, those that are right; of the largest around: true ones.
        self.predicted, self.right, self.found = (torch.zeros(self.bins, dtype=torch.int64) for _ in range(3))

    def _around(self, values: Tensor) -> Tensor:
        """The largest within the tolerance."""
        size = 2 * self.tolerance + 1
        return F.max_pool2d(values[:, None], size, stride=1, padding=self.tolerance)[:, 0]

    def _binned(self, values: Tensor) -> Tensor:
        places = (values * self.bins).long().clamp(0, self.bins - 1)
        return torch.bincount(places, minlength=self.bins).cpu()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs: logits `[B, 1, H, W]`. targets: 0 or 1 `[B, H, W]`."""
        kept = targets != self.ignore
        chances = one_channel(outputs, targets, "boundary F").double().sigmoid().masked_fill(~kept, 0)
        true = (targets == 1).double()
        self.predicted += self._binned(chances[kept])
        self.right += self._binned(chances[kept & (self._around(true) > 0)])
        self.found += self._binned(self._around(chances)[targets == 1])

    def curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, precision and recall at each."""
        predicted, right, found = (
            counts.flip(0).cumsum(0).flip(0)[1:].double() for counts in (self.predicted, self.right, self.found)
        )
        return torch.arange(1, self.bins) / self.bins, right / predicted.clamp(min=1), found / self.found.sum()

    def compute(self) -> float:
        if not int(self.found.sum()):
            return math.nan
        _, precision, recall = self.curve()
        both = precision + recall
        return float((2 * precision * recall / both.clamp(min=1e-300)).max())


class RMSE:
    """Root of the mean squared difference over the set's pixels with a finite target, in the targets' unit."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.pixels = 0.0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """outputs: `[B, 1, H, W]`. targets: `[B, H, W]`."""
        found, kept = one_channel(outputs, targets, "RMSE"), targets.isfinite()
        self.total += float((found[kept].double() - targets[kept].double()).square().sum())
        self.pixels += int(kept.sum())

    def compute(self) -> float:
        return math.sqrt(self.total / self.pixels) if self.pixels else math.nan


class MeanAngle:
    """Mean angle between outputs and unit normals, in degrees, over the set's pixels with finite targets."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.pixels = 0.0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Both `[B, 3, H, W]`."""
        check_normals(outputs, targets)
        kept = targets.isfinite().all(1)
        a, b = (F.normalize(one.double(), dim=1).movedim(1, 3)[kept] for one in (outputs, targets.nan_to_num(0, 0, 0)))
        # By sine and cosine: the arc cosine alone loses half of the digits of small angles.
        angles = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
        self.total += float(angles.rad2deg().sum())
        self.pixels += int(kept.sum())

    def compute(self) -> float:
        return self.total / self.pixels if self.pixels else math.nan


def delta_m(found: Mapping[str, float], reference: Mapping[str, float], larger: Mapping[str, bool]) -> float:
    """Mean over tasks of the relative change of a metric, in per cent, better being positive: Delta_m of multi-task
    learning (arXiv 1904.08918).

        100 / T * sum_t sign_t * (found_t - reference_t) / reference_t

    Args:
        found, reference: a metric by task; the reference is usually a model for each task alone. larger: by task, True
            where more is better.

    Raises:
        ConfigError: other tasks in one than in the others, or a reference of 0.
    """
    if not found or found.keys() != reference.keys() or found.keys() != larger.keys():
        raise ConfigError(
            f"delta_m: expected the same tasks in all, got {list(found)}, {list(reference)} and {list(larger)}"
        )
    zero = [name for name, value in reference.items() if value == 0]
    if zero:
        raise ConfigError(f"delta_m: expected a reference other than 0 of {zero[0]!r}")
    changes = [(1 if larger[n] else -1) * (found[n] - reference[n]) / reference[n] for n in found]
    return 100 * sum(changes) / len(changes)
