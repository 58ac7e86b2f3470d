"""Large images, a tile at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of `size` begin along a side, evenly: neighbours share at least `overlap`, the last ends with it. A
    side that is no longer than a tile has one."""
    if length <= size:
        return [0]
    step = size - overlap
    count = max(1, -(-(length - overlap) // step))
    return [round(place * (length - size) / max(1, count - 1)) for place in range(count)]


def tiled(
    run: Callable[[Tensor], Tensor], image: Tensor, size: tuple[int, int], overlap: int, batch: int = 8
) -> Tensor:
    """What a model makes of an image that is larger than it was trained on: `[n, H, W]` of `[C, H, W]`.

    Where tiles overlap their outputs are averaged with weights that fall linearly from a tile's middle to its border.

    Args:
        run: `[B, C, h, w]` to `[B, n, h, w]`. size: (h, w) of a tile; a side of the image that is shorter is one
            tile's.
        overlap: pixels that neighbours share at least. batch: tiles at a time.

    Raises:
        ConfigError: an overlap that leaves nothing of a tile.
    """
    height, width = image.shape[1:]
    if not 0 <= overlap < min(size):
        raise ConfigError(f"overlap: expected 0 to {min(size) - 1} pixels for tiles of {list(size)}, got {overlap}")
    down, across = min(size[0], height), min(size[1], width)
    places = [(top, left) for top in starts(height, size[0], overlap) for left in starts(width, size[1], overlap)]
    weight = _ramp(down)[:, None] * _ramp(across)[None, :]
    total: Tensor | None = None
    norm = torch.zeros(height, width)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        outputs = run(torch.stack([image[:, top : top + down, left : left + across] for top, left in some]))
        for (top, left), output in zip(some, outputs.float().cpu(), strict=True):
            total = torch.zeros(output.shape[0], height, width) if total is None else total
            total[:, top : top + down, left : left + across] += weight * output
            norm[top : top + down, left : left + across] += weight
    assert total is not None
    return total / norm


def _ramp(size: int) -> Tensor:
    """Weights along a side, largest in the middle, above 0."""
    places = torch.arange(size, dtype=torch.float32)
    return torch.minimum(places + 1, size - places) / ((size + 1) // 2)
