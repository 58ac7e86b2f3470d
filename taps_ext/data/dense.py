"""`dense:DIR`: images and the maps that belong to them, of several kinds, for several tasks at once.

DIR/train, DIR/val and DIR/test each hold images/ and a folder for each kind of map, with files of the images' names
(whatever their endings); a map that is not there is missing for its task. DIR may be a zip archive of such folders.
Without val/ 15 % of the training images validate, and where DIR holds images/ itself 15 % test as well: those whose
names have the lowest hashes, whatever the seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..dense import boundaries, distance
from ..dense.losses import IGNORED
from ..errors import SourceError, suggestion
from .maps import Files, read_image, read_map
from .source import Statistics, apply_normalize, check_normalize

KINDS = {
    "segmentation": "a class of each pixel",
    "boundaries": "between the classes of a label map",
    "distance": "to the nearest boundary of a label map, up to `limit` pixels, as a share of it",
    "edges": "a map of 0 and others",
    "saliency": "a map of 0 and others, balanced by the batch",
    "depth": "values of 8 or 16 bits or a float array, of which 0 says that there is none",
    "normals": "vectors as RGB, x to the right, of which black says that there is none",
}
"""What a task's maps are, by its `kind`."""
DERIVED = ("segmentation", "boundaries", "distance")  # of label maps


@dataclass(frozen=True, kw_only=True)
class MapTask:
    """What one task sees of the maps.

    Attributes:
        kind: one of :data:`KINDS`. map: the folder of its maps. ignore: labels of pixels that do not count.
        classes: how many a segmentation has, so that other labels are refused; None: not known.
        limit: of distances, in pixels of the image as it is handed out. scale: depth for one unit of the file.

    Raises:
        SourceError: an unknown kind, or other values than these.
    """

    kind: str
    map: str = "labels"
    ignore: tuple[int, ...] = ()
    classes: int | None = None
    limit: float = 20.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SourceError(
                f"kind: expected one of {list(KINDS)}, got {self.kind!r}{suggestion(str(self.kind), KINDS)}"
            )
        if not isinstance(self.map, str) or not self.map or set(self.map) & {"/", "\\"} or self.map == "images":
            raise SourceError(f"map: expected the name of a folder beside images, got {self.map!r}")
        if not all(type(label) is int and 0 <= label < 256 for label in self.ignore):
            raise SourceError(f"ignore: expected labels from 0 to 255, got {list(self.ignore)!r}")
        for name, value in (("limit", self.limit), ("scale", self.scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise SourceError(f"{name}: expected a number > 0, got {value!r}")
        if self.limit < 1:
            raise SourceError(f"limit: expected at least 1 pixel, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How images and their maps are handed out.

    Attributes:
        size: (height, width). scale: training images are first brought to that size times a factor drawn from this
            range, by its logarithm; what is larger is cropped anywhere, what is smaller filled up with pixels that do
            not count. flip: training images are mirrored, every other one. channels: 1 or 3.
        normalize: (mean, std), or None for images in [0, 1].

    Raises:
        SourceError: other values than these.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = True
    channels: int = 3
    normalize: Statistics | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(type(side) is int and 0 < side <= 1 << 14 for side in self.size):
            raise SourceError(f"size: expected (height, width) in pixels, got {self.size!r}")
        numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in self.scale)
        if len(self.scale) != 2 or not numbers or not 0 < self.scale[0] <= self.scale[1] <= 16:
            raise SourceError(f"scale: expected two factors, the smaller one first, got {self.scale!r}")
        if not isinstance(self.flip, bool):
            raise SourceError(f"flip: expected true or false, got {self.flip!r}")
        if self.channels not in (1, 3):
            raise SourceError(f"channels: expected 1 (grey) or 3 (RGB), got {self.channels!r}")
        if self.normalize is not None:
            check_normalize(self.normalize, self.channels)


class DenseDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Items (image float32 `[C, H, W]`, {task: map}) of one split; a task is left out where its map is missing.

    Maps are int64 `[H, W]` with 255 where a label does not count, float32 `[H, W]` with NaN where there is no value,
    or float32 `[3, H, W]` unit normals with NaN. What is drawn for training images comes from torch's generator.

    Raises:
        SourceError: no images; a kind of maps that no image has.
    """

    def __init__(
        self,
        files: Files,
        split: str,
        tasks: Mapping[str, MapTask],
        geometry: Geometry,
        *,
        train: bool,
        stems: Sequence[str] | None = None,
    ) -> None:
        self.files, self.tasks, self.geometry, self.train = files, dict(tasks), geometry, train
        self.images = files.folder(split, "images")
        self.maps = {kind: files.folder(split, kind) for kind in {task.map for task in tasks.values()}}
        if not self.images:
            raise SourceError(f"{files.root}: expected image files in {split}/images, got none")
        for kind, found in self.maps.items():
            if not found.keys() & self.images.keys():
                raise SourceError(f"{files.root}: no file in {split}/{kind} has the name of an image")
        self.stems = list(self.images) if stems is None else list(stems)

    def __len__(self) -> int:
        return len(self.stems)

    def identity(self) -> Any:
        """What tells this dataset from another: the files, and how they are read."""
        used = [self.images, *(self.maps[kind] for kind in sorted(self.maps))]
        names = [group[stem] for group in used for stem in self.stems if stem in group]
        files = [[name, *self.files.sums[name]] for name in names]
        return [files, {name: repr(task) for name, task in self.tasks.items()}, repr(self.geometry), self.train]

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        stem = self.stems[index]
        image = read_image(self.files, self.images[stem], self.geometry.channels)
        raw: dict[str, Tensor] = {}
        for kind, found in self.maps.items():
            if stem in found:
                raw[kind] = read_map(self.files, found[stem])
                if raw[kind].shape[-2:] != image.shape[-2:]:
                    raise SourceError(
                        f"{found[stem]}: expected {list(image.shape[-2:])} as its image has, got "
                        f"{list(raw[kind].shape[-2:])}"
                    )
        place = self._place(image)
        targets = {
            name: self._target(self.maps[task.map][stem], task, raw[task.map], place)
            for name, task in self.tasks.items()
            if task.map in raw
        }
        return apply_normalize(self._moved(image, place, 0.0, smooth=True), self.geometry.normalize), targets

    def stored(self, index: int) -> Tensor:
        """One image as it is stored, `[C, h, w]` in [0, 1]."""
        return read_image(self.files, self.images[self.stems[index]], self.geometry.channels)

    # -- the same for an image and all of its maps

    def _place(self, image: Tensor) -> _Place:
        height, width = self.geometry.size
        if not self.train:
            return _Place(height, width, 0, 0, False)
        low, high = self.geometry.scale
        factor = math.exp(float(torch.empty(()).uniform_(math.log(low), math.log(high)))) if low < high else low
        across, down = max(1, round(width * factor)), max(1, round(height * factor))
        top, left = (int(torch.randint(max(0, big - side) + 1, ())) for big, side in ((down, height), (across, width)))
        return _Place(down, across, top, left, self.geometry.flip and bool(torch.randint(2, ())))

    def _moved(self, values: Tensor, place: _Place, fill: float, *, smooth: bool) -> Tensor:
        """`[C, h, w]` resized, cropped or filled up, and mirrored."""
        if tuple(values.shape[-2:]) != (place.height, place.width):
            if smooth:
                values = F.interpolate(values[None], (place.height, place.width), mode="bilinear", antialias=True)[0]
            else:
                values = F.interpolate(values[None], (place.height, place.width), mode="nearest-exact")[0]
        height, width = self.geometry.size
        values = values[:, place.top : place.top + height, place.left : place.left + width]
        missing = height - values.shape[1], width - values.shape[2]
        if any(missing):
            values = F.pad(values, (0, missing[1], 0, missing[0]), value=fill)
        return values.flip(-1) if place.flip else values

    def _target(self, file: str, task: MapTask, raw: Tensor, place: _Place) -> Tensor:
        if task.kind == "depth":
            values = _one(raw, file, task).double() * task.scale
            values = torch.where((values == 0) | ~values.isfinite(), math.nan, values).float()
            return self._moved(values[None], place, math.nan, smooth=False)[0]
        if task.kind == "normals":
            return self._normals(raw, file, place)
        labels = _labels(raw, file, task)
        void = torch.zeros_like(labels, dtype=torch.bool)
        for label in (*task.ignore, IGNORED):
            if label != IGNORED or task.kind in DERIVED:
                void |= labels == label
        if task.kind not in DERIVED:
            labels = (labels != 0).long()
        labels = labels.masked_fill(void, IGNORED)
        if task.classes is not None and bool(((labels >= task.classes) & ~void).any()):
            got = int(labels[(labels >= task.classes) & ~void].max())
            raise SourceError(
                f"{file}: expected labels from 0 to {task.classes - 1}, or such as are ignored, got {got}"
            )
        moved = self._moved(labels[None].float(), place, IGNORED, smooth=False)[0].long()
        if task.kind == "boundaries":
            return boundaries(moved)
        if task.kind == "distance":
            far = distance(boundaries(moved), task.limit)
            return far.masked_fill(moved == IGNORED, math.nan)
        return moved

    def _normals(self, raw: Tensor, file: str, place: _Place) -> Tensor:
        if raw.dim() != 3 or raw.shape[0] != 3:
            raise SourceError(f"{file}: expected normals [3, h, w], got {list(raw.shape)}")
        values = raw.float() if raw.is_floating_point() else raw.float() / 127.5 - 1
        nothing = (raw == 0).all(0) | ~values.isfinite().all(0)
        values = F.normalize(values, dim=0).masked_fill(nothing, math.nan)
        moved = self._moved(values, place, math.nan, smooth=False)
        if place.flip:
            moved = moved * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)  # mirrored, x points the other way
        return moved


@dataclass(frozen=True)
class _Place:
    """The size that an image is brought to, where it is cropped, and whether it is mirrored."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


def _one(raw: Tensor, file: str, task: MapTask) -> Tensor:
    if raw.dim() != 2:
        raise SourceError(f"{file}: expected a map of one channel for {task.kind}, got {list(raw.shape)}")
    return raw


def _labels(raw: Tensor, file: str, task: MapTask) -> Tensor:
    """The labels of a map, int64 `[h, w]`."""
    labels = _one(raw, file, task)
    if labels.is_floating_point():
        raise SourceError(f"{file}: expected whole numbers as labels, got {labels.dtype}")
    if labels.numel() and int(labels.min()) < 0:
        raise SourceError(f"{file}: expected labels from 0 on (255 does not count), got {int(labels.min())}")
    return labels.long()


@dataclass(frozen=True)
class DenseSource:
    """The splits of `dense:DIR`, as datasets of (image, {task: map}).

    Attributes:
        name: the spec. val: None where there is no such folder. test: None likewise.
    """

    name: str
    geometry: Geometry
    train: DenseDataset
    val: DenseDataset | None
    test: DenseDataset | None

    def splits(self) -> dict[str, DenseDataset]:
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: data for name, data in named.items() if data is not None}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are made, as a task file keeps it."""
        height, width = self.geometry.size
        normalize = self.geometry.normalize
        return {
            "channels": self.geometry.channels,
            "height": height,
            "width": width,
            "normalize": None if normalize is None else [list(part) for part in normalize],
        }


def open_dense(spec: str, tasks: Mapping[str, MapTask], geometry: Geometry | Mapping[str, Any]) -> DenseSource:
    """Open `dense:DIR` for these tasks.

    Args:
        geometry: how images are handed out; or arguments of :class:`Geometry`, without a `size` in that of the first
            training image.

    Raises:
        SourceError: no such folder or archive; no training images; maps that no image has.
    """
    scheme, _, rest = spec.partition(":")
    if scheme != "dense" or not rest:
        raise SourceError(f"source: expected dense:DIR, got {spec!r}")
    files = Files(Path(rest))
    if not isinstance(geometry, Geometry):
        settings = dict(geometry)
        if settings.get("size") is None:
            names = files.folder("train", "images") or files.folder("", "images")
            if not names:
                raise SourceError(f"{files.root}: expected images in train/images or images, got none")
            _, height, width = read_image(files, next(iter(names.values())), 1).shape
            settings["size"] = height, width
        geometry = Geometry(**settings)
    ready = [split for split in ("train", "val", "test") if files.folder(split, "images")]
    stems = {split: list(files.folder(split, "images")) for split in ready}
    if not ready:
        whole = list(files.folder("", "images"))
        stems["test"], rest_of = _held(whole)
        stems["val"], stems["train"] = _held(rest_of, len(stems["test"]))
    elif "val" not in ready and "train" in ready:
        stems["val"], stems["train"] = _held(stems["train"])
    if not stems.get("train"):
        raise SourceError(f"{files.root}: expected images in train/images or images, got none")
    made = {}
    for split, chosen in stems.items():
        folder = "" if not ready else split if split in ready else "train"
        made[split] = DenseDataset(files, folder, tasks, geometry, train=split == "train", stems=chosen)
    return DenseSource(spec, geometry, made["train"], made.get("val"), made.get("test"))


def _held(stems: Sequence[str], count: int | None = None) -> tuple[list[str], list[str]]:
    """(held out, the rest): 15 % of the images, or `count`, by the hashes of their names.

    Raises:
        SourceError: too few images.
    """
    count = max(1, round(0.15 * len(stems))) if count is None else count
    if len(stems) <= count:
        raise SourceError(f"dense: expected more than {count} images, of which some are held out, got {len(stems)}")
    order = sorted(stems, key=lambda stem: hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest())
    return sorted(order[:count]), sorted(order[count:])


def class_weights(data: DenseDataset, task: str, classes: int) -> list[float]:
    """Weights against rare classes, from all stored maps of a task: `1 / log(1.02 + share)` (ENet,
    arXiv 1606.02147)."""
    counts = torch.zeros(classes, dtype=torch.float64)
    known = data.tasks[task]
    for stem in data.stems:
        if stem in data.maps[known.map]:
            file = data.maps[known.map][stem]
            labels = _labels(read_map(data.files, file), file, known).flatten()
            for label in known.ignore:
                labels = labels[labels != label]
            counts += torch.bincount(labels[labels < classes], minlength=classes)
    shares = counts / counts.sum().clamp(min=1)
    return [1 / math.log(1.02 + share) for share in shares.tolist()]
