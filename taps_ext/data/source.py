"""What a data source is, and the pixel plumbing every source shares.

A source is three fixed splits of images and labels. Images are float32 [C, H, W] in [0, 1] (before the
optional normalisation), labels are int64 class indices. Sources know nothing of models.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import SourceError

Statistics = tuple[Sequence[float], Sequence[float]]
"""Per-channel (mean, std) in units of pixel values in [0, 1]."""


@dataclass(frozen=True)
class Options:
    """How images are wanted; the arguments of `open_source`, passed as one to each kind of source.

    Attributes:
        size: side in pixels, or None for the source's own.
        channels: 1 (grey), 3 (RGB), or None for the source's own.
        seed: of what is random about training images.
        normalize: (mean, std), or None for images in [0, 1].

    Raises:
        SourceError: a value out of range.
    """

    size: int | None = None
    channels: int | None = None
    seed: int = 0
    normalize: Statistics | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise SourceError(f"size: expected a positive number of pixels, got {self.size!r}")
        if self.channels is not None and (type(self.channels) is not int or self.channels not in (1, 3)):
            raise SourceError(f"channels: expected 1 (grey) or 3 (RGB), got {self.channels!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**60:
            raise SourceError(f"seed: expected an integer from 0 to 2^60, got {self.seed!r}")
        if self.normalize is not None:
            check_normalize(self.normalize)


@runtime_checkable
class SizedDataset(Protocol):
    """Anything a `DataLoader` accepts that has a length; items are (image [C, H, W] float32, label int64)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory.

    Args:
        x: images, float32 [N, C, H, W].
        y: class indices, int64 [N].

    Indexing with an int gives one (image [C, H, W], label []); with a slice or an int64 tensor [B] a whole
    batch.

    Raises:
        SourceError: wrong dtype or rank, or `x` and `y` differ in length.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        if x.dtype != torch.float32 or x.ndim != 4:
            raise SourceError(f"x: expected float32 [N, C, H, W], got {x.dtype} {list(x.shape)}")
        if y.dtype != torch.int64 or y.ndim != 1:
            raise SourceError(f"y: expected int64 [N], got {y.dtype} {list(y.shape)}")
        if len(x) != len(y):
            raise SourceError(f"x has {len(x)} images but y has {len(y)} labels")
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class NormalizedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Another dataset with each image standardised as it is read: (x - mean) / std per channel."""

    def __init__(self, inner: SizedDataset, normalize: Statistics) -> None:
        check_normalize(normalize, int(inner[0][0].shape[0]))
        self.inner, self.statistics = inner, normalize

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.inner[index]
        return apply_normalize(x, self.statistics), y

    def identity(self) -> list[Any]:
        """What tells this dataset from another (see `FolderDataset.identity`)."""
        inner = getattr(self.inner, "identity", None)
        return [inner() if callable(inner) else len(self.inner), self.statistics]

    @property
    def y(self) -> Tensor:
        """All targets [N], where the inner dataset knows them without reading the images."""
        targets: Tensor = self.inner.y  # type: ignore[attr-defined]
        return targets


@dataclass(frozen=True)
class Source:
    """Fixed splits of one classification problem.

    Attributes:
        name: the spec it was opened with.
        train, test: datasets of (float32 [C, H, W], int64 label).
        val: a third split, or None: take one from `train`, never from `test`.
        classes: label names; label i means `classes[i]`.
        description: what the images are and how the splits are kept apart.
        licence: of the data.
        normalize: the (mean, std) already applied to the images, or None when they are in [0, 1].
    """

    name: str
    train: SizedDataset
    val: SizedDataset | None
    test: SizedDataset
    classes: tuple[str, ...]
    description: str = ""
    licence: str = ""
    normalize: Statistics | None = None

    def __post_init__(self) -> None:
        for split, data in self.splits().items():
            if len(data) == 0:
                raise SourceError(f"{self.name}: the {split} split is empty")
            if isinstance(data, ArrayDataset):
                low, high = int(data.y.min()), int(data.y.max())
                if low < 0 or high >= len(self.classes):
                    allowed = f"0..{len(self.classes) - 1} for {len(self.classes)} classes"
                    raise SourceError(f"{self.name}: {split} labels span {low}..{high}, expected {allowed}")

    def splits(self) -> dict[str, SizedDataset]:
        """The splits that exist, by name, in the order train, val, test."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: data for name, data in named.items() if data is not None}

    @property
    def num_classes(self) -> int:
        """Number of classes, the width of a task's head."""
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one image."""
        return tuple(self.train[0][0].shape)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the images are made, as a task file keeps it: channels, height, width, and [mean, std] or None."""
        channels, height, width = self.shape
        normalize = None if self.normalize is None else [list(part) for part in self.normalize]
        return {"channels": channels, "height": height, "width": width, "normalize": normalize}

    def summary(self) -> str:
        """One line: name, images per split, classes, image shape."""
        sizes = " / ".join(f"{len(data)} {name}" for name, data in self.splits().items())
        return f"{self.name}: {sizes}, {self.num_classes} classes, {'x'.join(map(str, self.shape))}"


def require(module: str, package: str) -> Any:
    """Import an optional dependency.

    Raises:
        SourceError: it is not installed; the message names the package and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = "pip install taps_ext[demo]"
        raise SourceError(f"this source needs {package}, which is not installed: {hint}") from error


def check_normalize(normalize: Statistics, channels: int | None = None) -> None:
    """Check (mean, std): finite numbers, std > 0, one for all channels or one for each.

    Raises:
        SourceError: it is something else; with `channels` None any number of channels passes.
    """
    try:
        mean, std = (torch.tensor(list(part), dtype=torch.float64) for part in normalize)
    except (TypeError, ValueError) as error:
        raise SourceError(f"normalize: expected (mean, std), two sequences, got {normalize!r}") from error
    allowed = (1, 3) if channels is None else (1, channels)
    if len(mean) not in allowed or len(std) not in allowed:
        got = f"{len(mean)} and {len(std)}"
        raise SourceError(f"normalize: expected 1 or {allowed[1]} values in mean and std, got {got}")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise SourceError(f"normalize: expected finite means and std > 0, got {normalize!r}")


def apply_normalize(x: Tensor, normalize: Statistics | None) -> Tensor:
    """Standardise images [..., C, H, W]: (x - mean) / std per channel; None returns `x` itself."""
    if normalize is None:
        return x
    mean, std = (torch.tensor(list(part), dtype=torch.float32).view(-1, 1, 1) for part in normalize)
    return (x - mean) / std


def to_channels(x: Tensor, channels: int | None) -> Tensor:
    """Images [N, C, H, W] with 1 or 3 channels: grey is repeated, RGB becomes luma (BT.601). None keeps C."""
    if channels is None or channels == x.shape[1]:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def resize(x: Tensor, size: int | None) -> Tensor:
    """Images [N, C, H, W] at [N, C, size, size], bilinear, antialiased if shrinking. None keeps the size."""
    if size is None or tuple(x.shape[2:]) == (size, size) or len(x) == 0:
        return x
    shrinking = size < max(x.shape[2:])
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=shrinking)


def quantize(x: Tensor) -> Tensor:
    """Round to the 256 levels of an 8-bit image, k / 255 as float32: equal pictures are equal bytes."""
    return (x.clamp(0, 1) * 255).round_().div_(255)


def finish(x: Tensor, channels: int | None, normalize: Statistics | None) -> Tensor:
    """The last step of every in-memory source: channels, 8-bit levels, then the optional normalisation."""
    x = quantize(to_channels(x, channels))
    if normalize is not None:
        check_normalize(normalize, x.shape[1])
    return apply_normalize(x, normalize)


def affine(x: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Turn, scale and move images about their centre; what comes in from outside is 0.

    Args:
        x: images [N, C, S, S].
        angle: counter-clockwise, radians [N].
        scale: magnification [N].
        shift: (right, down) in fractions of the side [N, 2].
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    right, down = 2 * shift[:, 0], 2 * shift[:, 1]
    rows = [cos, -sin, -(cos * right - sin * down), sin, cos, -(sin * right + cos * down)]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """`count` numbers from [low, high), float32 [count]."""
    return torch.rand(count, generator=generator) * (high - low) + low


def split_generator(seed: int, split: str) -> torch.Generator:
    """The random stream of one split.

    Only `train` follows the seed: `val` and `test` are the same images in every run, so that results of
    different seeds compare.
    """
    offset = {"train": 0, "val": 1, "test": 2}[split]
    base = seed if split == "train" else 0
    return torch.Generator().manual_seed(3 * base + offset)
