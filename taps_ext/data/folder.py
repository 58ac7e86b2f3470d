"""`imagefolder:DIR`: image files in one folder per class, read with Pillow when they are asked for.

DIR/train, DIR/val and DIR/test each hold the class folders; with train and val alone, val is the test set.
Otherwise DIR holds the class folders itself and 15 % of each class validate, 15 % test: those whose names have the
lowest hashes, whatever the seed, so that an image more or less moves one or two others of its class. Copies of one
image under two names are not detected.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import SourceError
from .source import Options, Source, Statistics, apply_normalize, check_normalize, require

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of what :data:`EXTENSIONS` are; it can open more, some by programs of others."""


def read_image(path: Path, size: int, channels: int) -> Tensor:
    """One image, float32 [channels, size, size] in [0, 1].

    It is turned upright by its EXIF tag, its shorter side scaled to `size` (bilinear, antialiased), and its
    centre square kept. Alpha is dropped; of an animation the first frame counts.

    Raises:
        SourceError: no image, truncated, absurdly large, or more than 8 bits deep; the message names the
            file.
    """
    return _decoded(path, f" {path}", size, size, channels)


def decode_image(body: bytes, height: int, width: int, channels: int, most: int) -> Tensor:
    """The same from a file's bytes, which nobody vouches for: float32 [channels, height, width].

    Args:
        most: pixels that the image may have; one that says that it has more is not decoded.

    Raises:
        SourceError: as above, and another format than those of :data:`FORMATS`.
    """
    try:
        return _decoded(io.BytesIO(body), "", height, width, channels, most, FORMATS)
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # what damaged bytes raise in one of many decoders
        raise SourceError(f"cannot read image: {type(error).__name__}: {error}") from error


def _decoded(
    file: Path | io.BytesIO,
    name: str,
    height: int,
    width: int,
    channels: int,
    most: int | None = None,
    formats: Sequence[str] | None = None,
) -> Tensor:
    image_module, operations = require("PIL.Image", "pillow"), require("PIL.ImageOps", "pillow")
    try:
        with image_module.open(file, formats=formats) as image:
            if most is not None and image.width * image.height > most:
                got = f"{image.width} x {image.height}"
                raise SourceError(f"cannot read image{name}: expected at most {most} pixels, got {got}")
            if image.mode.startswith(("I", "F")):
                raise SourceError(f"cannot read image{name}: mode {image.mode} is deeper than 8 bits")
            image = operations.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            image = operations.fit(image, (width, height), method=image_module.Resampling.BILINEAR)
    except SourceError:
        raise
    except image_module.UnidentifiedImageError as error:
        what = "expected a JPEG, PNG, WebP, BMP, GIF, TIFF or PPM" if formats else str(error)
        raise SourceError(f"cannot read image{name}: {what}") from error
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise SourceError(f"cannot read image{name}: {error}") from error
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).view(height, width, channels)
    return pixels.permute(2, 0, 1).float().div_(255)


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Image files and their labels; item i is (float32 [C, S, S], int64 []), read in `__getitem__`.

    Attributes:
        paths: the files.
        y: class indices, int64 [N].
    """

    def __init__(
        self, items: Sequence[tuple[Path, int]], size: int, channels: int, normalize: Statistics | None = None
    ) -> None:
        if normalize is not None:
            check_normalize(normalize, channels)
        self.paths = [path for path, _ in items]
        self.y = torch.tensor([label for _, label in items], dtype=torch.int64)
        self.size, self.channels, self.statistics = size, channels, normalize

    def identity(self) -> list[Any]:
        """What tells this dataset from another: the files with their sizes and times, and how they are read."""
        files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in self.paths]
        return [files, self.size, self.channels, self.statistics]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = read_image(self.paths[index], self.size, self.channels)
        return apply_normalize(x, self.statistics), self.y[index]


def _hidden(path: Path) -> bool:
    """True if any part of a path starts with a dot, as the copies that notebooks keep do."""
    return any(part.startswith(".") for part in path.parts)


def class_names(folder: Path) -> list[str]:
    """Names of the visible folders in `folder`, sorted."""
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(name for name in names if not name.startswith("."))


def list_images(folder: Path, classes: Sequence[str]) -> tuple[dict[str, list[Path]], int]:
    """Image files per class, sorted, at any depth below the class folder, and how many other files lie there.

    Raises:
        SourceError: a class that is not in `classes`, or a class folder without images.
    """
    found: dict[str, list[Path]] = {}
    others = 0
    for name in class_names(folder):
        if name not in classes:
            raise SourceError(f"{folder / name}: class {name!r} does not exist in train")
        inside = (folder / name).rglob("*")
        files = sorted(p for p in inside if p.is_file() and not _hidden(p.relative_to(folder)))
        found[name] = [path for path in files if path.suffix.lower() in EXTENSIONS]
        others += len(files) - len(found[name])
        if not found[name]:
            raise SourceError(f"{folder / name}: no images (looked for {' '.join(EXTENSIONS)})")
    return found, others


def stratified(root: Path, found: dict[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
    """Three splits of each class, 70 % / 15 % / 15 % and at least one image in each, by hashes of their names.

    Raises:
        SourceError: a class with fewer than 3 images.
    """
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "val": {}, "test": {}}
    for name, paths in found.items():
        if len(paths) < 3:
            raise SourceError(f"{paths[0].parent}: class {name!r} has {len(paths)} images, a split needs 3")
        order = sorted(paths, key=lambda path: _hash(path.relative_to(root)))
        held = max(1, round(0.15 * len(paths)))
        splits["test"][name] = sorted(order[:held])
        splits["val"][name] = sorted(order[held : 2 * held])
        splits["train"][name] = sorted(order[2 * held :])
    return splits


def _hash(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()


def open_folder(rest: str, options: Options) -> Source:
    """`imagefolder:DIR` at [channels, size, size]; defaults 3 and 224. The seed has no effect.

    Raises:
        SourceError: no such folder, no classes or images, a class unknown to train, or pillow is not
            installed.
    """
    require("PIL.Image", "pillow")
    root = Path(rest)
    if not root.is_dir():
        raise SourceError(f"imagefolder: no such folder: {rest}")
    ready = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    if ("train" in ready and len(ready) == 1) or (ready and "train" not in ready):
        alone = " and ".join(f"{split}/" for split in ready)
        raise SourceError(f"{root}: has only {alone}; expected train/ with test/ or val/, or class folders")
    classes = class_names(root / "train" if ready else root)
    if not classes:
        raise SourceError(f"{root}: no class folders")
    if ready:
        listed = {split: list_images(root / split, classes) for split in ready}
        others = sum(count for _, count in listed.values())
        splits = {split: found for split, (found, _) in listed.items()}
        text = f"image files of {root.name}, splits as stored"
        if "test" not in splits:
            splits["test"] = splits.pop("val")
            text += " (there is no test folder: val is the test set)"
    else:
        found, others = list_images(root, classes)
        splits = stratified(root, found)
        text = f"image files of {root.name}, fixed stratified split 70/15/15 by file name"
    if others:
        text += f"; {others} other files left out"
    datasets = {
        split: FolderDataset(
            [(path, classes.index(name)) for name, paths in found.items() for path in paths],
            options.size or 224,
            options.channels or 3,
            options.normalize,
        )
        for split, found in splits.items()
    }
    return Source(
        f"imagefolder:{rest}",
        datasets["train"],
        datasets.get("val"),
        datasets["test"],
        classes=tuple(classes),
        description=text,
        normalize=options.normalize,
    )
