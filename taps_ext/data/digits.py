"""Handwritten digits: scikit-learn's `load_digits`, 1797 real 8x8 images with 17 grey levels.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak, 1998).
It carries no writer ids, but neighbouring rows tend to come from one hand. The split is stratified and in
file order, of each class the first 60 % to train, the next 15 % to validate, the last 25 % to test, so that
one writer's digits mostly stay on one side. Every `digits:*` task uses this one split, whatever the seed: a
base trained on `digits:plain` has seen no test image of another digits task.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .source import (
    ArrayDataset,
    Options,
    Source,
    affine,
    finish,
    require,
    resize,
    split_generator,
    uniform,
)

TASKS = {
    "plain": "handwritten digits 0-9",
    "rotated": "handwritten digits on their side: a quarter turn, then up to 20 degrees either way",
    "parity": "handwritten digits, even or odd",
    "occluded": "handwritten digits, smaller, moved, and partly hidden by a grey square",
}
TRAIN_DRAWS = {"plain": 1, "rotated": 2, "parity": 1, "occluded": 3}
"""How often each training image appears, each time with its own angle, place and square."""

LICENCE = "CC BY 4.0 (UCI Machine Learning Repository, doi 10.24432/C50P49)"


def split_rows(labels: Tensor) -> dict[str, Tensor]:
    """Row numbers of each split, ascending int64: per class 60 % / 15 % / 25 % in file order."""
    rows: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for label in range(int(labels.max()) + 1):
        own = (labels == label).nonzero().flatten()
        first, second = round(len(own) * 0.60), round(len(own) * 0.75)
        for split, part in zip(rows, (own[:first], own[first:second], own[second:]), strict=True):
            rows[split].append(part)
    return {split: torch.cat(parts).sort().values for split, parts in rows.items()}


def open_digits(task: str, options: Options) -> Source:
    """One of `TASKS` at [channels, size, size]; defaults 1 and 16.

    Raises:
        SourceError: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    images = resize(images, options.size or 16)

    splits: dict[str, ArrayDataset] = {}
    for split, rows in split_rows(labels).items():
        rows = rows.repeat(TRAIN_DRAWS[task] if split == "train" else 1)
        x, y = images[rows], labels[rows]
        generator = split_generator(options.seed, split)
        if task == "rotated":
            x = rotated(x, generator)
        elif task == "occluded":
            x = occluded(x, generator)
        elif task == "parity":
            y = y % 2
        splits[split] = ArrayDataset(finish(x, options.channels, options.normalize), y)

    classes = ("even", "odd") if task == "parity" else tuple("0123456789")
    description = (
        f"{TASKS[task]}; UCI optical digits from scikit-learn; one stratified split in file order (no writer "
        "ids exist), shared by all digits tasks"
    )
    return Source(
        f"digits:{task}",
        **splits,
        classes=classes,
        description=description,
        licence=LICENCE,
        normalize=options.normalize,
    )


def rotated(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned by 90 degrees, then up to 20 more or less: one direction only, so 6 and 9 stay apart."""
    angle = math.pi / 2 + uniform(generator, len(x), -math.pi / 9, math.pi / 9)
    return affine(x, angle, torch.full((len(x),), 0.9), torch.zeros(len(x), 2))


def occluded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images at 3/4 scale, moved by up to 1/8 of the side, under a grey (0.5) square of 5/16 of the side."""
    count, side = len(x), x.shape[-1]
    shift = torch.stack([uniform(generator, count, -0.125, 0.125) for _ in range(2)], 1)
    x = affine(x, torch.zeros(count), torch.full((count,), 0.75), shift)
    box = max(1, round(side * 5 / 16))
    room = side - box + 1
    top, left = ((uniform(generator, count, 0, 1) * room).long().view(-1, 1, 1, 1) for _ in range(2))
    row, column = torch.arange(side).view(1, 1, -1, 1), torch.arange(side).view(1, 1, 1, -1)
    hidden = (row >= top) & (row < top + box) & (column >= left) & (column < left + box)
    return torch.where(hidden, torch.tensor(0.5), x)
