"""Patches of the two photographs that scikit-learn carries, 427 x 640 RGB: a Chinese temple and a dahlia.

Each photograph is cut into a grid of 8 x 12 cells of 53 x 53 pixels. A cell belongs to one split (60 to
train, 12 to val, 24 to test, in a fixed pattern) and a patch lies inside one cell, so no pixel is shared
between splits. Patches of nearly even tone (standard deviation below 0.03) are skipped, and all are turned by
a random multiple of 90 degrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .source import ArrayDataset, Options, Source, finish, require, resize, split_generator

TASKS = {
    "patches": (("china", "flower"), "which of two photographs a patch comes from"),
    "distortion": (
        ("original", "blurred", "pixelated", "posterised"),
        "what was done to a photograph's patch",
    ),
}
COUNTS = {"train": 3000, "val": 400, "test": 800}
"""Patches per split, equally many per class."""

ROWS, COLUMNS, CELL, PATCH = 8, 12, 53, 32
MIN_CONTRAST = 0.03
PATTERN = ("test", "train", "train", "val", "train", "test", "train", "train")
"""Cell (row, column) belongs to PATTERN[(3 * row + column) % 8]: a knight's-move pattern without runs."""

LICENCE = "CC BY 2.0: china.jpg by danielbuechele, flower.jpg by vultilion (Flickr), from scikit-learn"


def cells(split: str) -> list[tuple[int, int]]:
    """The (top, left) pixel of each cell of a split; a cell is CELL x CELL pixels."""
    places = ((row, column) for row in range(ROWS) for column in range(COLUMNS))
    return [(row * CELL, column * CELL) for row, column in places if PATTERN[(3 * row + column) % 8] == split]


def places(split: str, seed: int, photographs: list[Tensor]) -> Iterator[tuple[int, int, int, int]]:
    """Without end: (photograph, top, left, quarter turns) of a split's patches, photographs alternating."""
    generator, own = split_generator(seed, split), cells(split)
    while True:
        for photograph, pixels in enumerate(photographs):
            contrast = 0.0
            while contrast < MIN_CONTRAST:
                cell, down, right, turn = torch.rand(4, generator=generator).tolist()
                top, left = own[int(cell * len(own))]
                top, left = top + int(down * (CELL - PATCH + 1)), left + int(right * (CELL - PATCH + 1))
                contrast = float(pixels[:, top : top + PATCH, left : left + PATCH].mean(0).std())
            yield photograph, top, left, int(turn * 4)


def distort(x: Tensor, label: int) -> Tensor:
    """Patches [N, 3, PATCH, PATCH] as class `label` of `photos:distortion` shows them.

    Blurred: binomial 5 x 5 twice (sigma 1.4 pixels). Pixelated: blocks of 4 x 4. Posterised: the 4
    levels that span the patch's own range.
    """
    if label == 1:
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        kernel = (row[:, None] * row).expand(3, 1, 5, 5)
        for _ in range(2):
            x = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    elif label == 2:
        x = F.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    elif label == 3:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = low + ((x - low) / (high - low) * 3).round() / 3 * (high - low)
    return x


def open_photos(task: str, options: Options) -> Source:
    """One of `TASKS` at [channels, size, size]; defaults 3 and 16. A patch covers 32 x 32 pixels.

    Raises:
        SourceError: scikit-learn or pillow is not installed.
    """
    sample = require("sklearn.datasets", "scikit-learn")
    require("PIL.Image", "pillow")
    names = ("china.jpg", "flower.jpg")
    arrays = (sample.load_sample_image(name) for name in names)
    photographs = [torch.tensor(array).permute(2, 0, 1).float().div_(255) for array in arrays]
    classes, text = TASKS[task]
    splits: dict[str, ArrayDataset] = {}
    for split, count in COUNTS.items():
        chosen = list(itertools.islice(places(split, options.seed, photographs), count))
        x = torch.stack(
            [
                photographs[photograph][:, top : top + PATCH, left : left + PATCH].rot90(turns, (1, 2))
                for photograph, top, left, turns in chosen
            ]
        )
        y = torch.tensor([photograph for photograph, *_ in chosen])
        if task == "distortion":
            y = torch.arange(count) // 2 % len(classes)  # places() alternates: // 2 gives each class both photographs
            for label in range(len(classes)):
                x[y == label] = distort(x[y == label], label)
        x = resize(x, options.size or 16)
        splits[split] = ArrayDataset(finish(x, options.channels or 3, options.normalize), y)
    description = f"{text}; 32x32 patches from cells of the image that belong to one split only"
    return Source(
        f"photos:{task}",
        **splits,
        classes=classes,
        description=description,
        licence=LICENCE,
        normalize=options.normalize,
    )
