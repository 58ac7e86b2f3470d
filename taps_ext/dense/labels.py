"""Maps that are made of label maps: boundaries between classes, and how far the next one is."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import IGNORED


def boundaries(labels: Tensor, ignore: int = IGNORED) -> Tensor:
    """1 where one of the four neighbours is of another class, else 0, `ignore` where the label is that; int64 `[H, W]`.

    Neighbours without a class make no boundary.
    """
    found = torch.zeros_like(labels)
    for a, b in (
        ((slice(1, None),), (slice(None, -1),)),
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
    ):
        differ = (labels[a] != labels[b]) & (labels[a] != ignore) & (labels[b] != ignore)
        found[a] |= differ
        found[b] |= differ
    return found.masked_fill(labels == ignore, ignore)


def distance(boundary: Tensor, limit: float) -> Tensor:
    """Euclidean distance of each pixel to the nearest one that is 1, at most `limit` pixels, as a share of `limit`:
    float32 `[H, W]` in [0, 1]."""
    height, width = boundary.shape
    reach = int(limit)
    most = float(limit) ** 2
    # Squared distances along columns, then the least over columns of those and of the way across.
    along = torch.where(boundary == 1, 0.0, most).double()
    down = along.clone()
    for step in range(1, min(reach, height - 1) + 1):
        down[step:] = torch.minimum(down[step:], along[:-step] + step * step)
        down[:-step] = torch.minimum(down[:-step], along[step:] + step * step)
    found = down.clone()
    for step in range(1, min(reach, width - 1) + 1):
        found[:, step:] = torch.minimum(found[:, step:], down[:, :-step] + step * step)
        found[:, :-step] = torch.minimum(found[:, :-step], down[:, step:] + step * step)
    return (found.clamp(max=most).sqrt() / float(limit)).float()
