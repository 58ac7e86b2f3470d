"""Image files and maps in a folder or a zip archive."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SourceError
from .folder import EXTENSIONS
from .source import require


class Files:
    """The files of a folder, or of a zip archive, by their names in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.archive: tuple[int, zipfile.ZipFile] | None = None  # with the process that opened it
        self.sums: dict[str, list[int]] = {}
        if root.is_dir():
            for path in sorted(root.rglob("*")):
                name = path.relative_to(root)
                if path.is_file() and not any(part.startswith(".") for part in name.parts):
                    self.sums[name.as_posix()] = [path.stat().st_size, path.stat().st_mtime_ns]
        elif zipfile.is_zipfile(root):
            with zipfile.ZipFile(root) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
            self.sums = {info.filename: [info.file_size, info.CRC] for info in sorted(infos, key=lambda i: i.filename)}
        else:
            raise SourceError(f"dense: expected a folder or a zip archive, got {root}")

    def read(self, name: str) -> bytes:
        if self.root.is_dir():
            return (self.root / name).read_bytes()
        # Each process opens its own: a forked one would move the place at which its parent reads.
        if self.archive is None or self.archive[0] != os.getpid():
            self.archive = os.getpid(), zipfile.ZipFile(self.root)
        return self.archive[1].read(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "archive": None}

    def folder(self, split: str, kind: str) -> dict[str, str]:
        """Files of a kind by the name of their image; of all splits, where `split` is "". Raises SourceError where two
        have one name."""
        found: dict[str, str] = {}
        inside = (split, kind) if split else (kind,)
        for name in self.sums:
            path = PurePosixPath(name)
            if path.parts[: len(inside)] == inside and path.suffix.lower() in (*EXTENSIONS, ".npy"):
                stem = PurePosixPath(*path.parts[len(inside) :]).with_suffix("").as_posix()
                if stem in found:
                    raise SourceError(f"{self.root}: {found[stem]} and {name} have one name")
                found[stem] = name
        return found


def read_image(files: Files, name: str, channels: int) -> Tensor:
    """An image in its own size, float32 `[channels, h, w]` in [0, 1], turned upright by its EXIF tag.

    Raises:
        SourceError: a file that is none, or more than 8 bits deep.
    """
    return decoded(files.read(name), name, channels)


def decoded(body: bytes, name: str, channels: int) -> Tensor:
    """The same of a file's bytes; `name` is for messages."""
    with _opened(body, name) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would cut its values off at 255
            raise SourceError(f"cannot read image {name}: mode {image.mode} is deeper than 8 bits")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels.copy()).view(*pixels.shape[:2], channels).permute(2, 0, 1).float().div_(255)


def read_map(files: Files, name: str) -> Tensor:
    """A map in its own size: uint8, int32 or float32 `[h, w]`, or uint8 or float32 `[3, h, w]`."""
    if name.endswith(".npy"):
        try:
            found = np.load(io.BytesIO(files.read(name)), allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise SourceError(f"{name}: expected an array of numbers: {error}") from None
        if not isinstance(found, np.ndarray):
            raise SourceError(f"{name}: expected one array of numbers, got an archive of some")
        if found.dtype.kind not in "fiu" or found.ndim not in (2, 3):
            raise SourceError(f"{name}: expected numbers [h, w] or [3, h, w], got {found.dtype} {list(found.shape)}")
        if found.dtype.kind in "iu" and found.size and (found.min() < -(2**31) or found.max() >= 2**31):
            raise SourceError(f"{name}: expected whole numbers of 32 bits, got {found.min()} to {found.max()}")
        return torch.from_numpy(found.astype(np.float32 if found.dtype.kind == "f" else np.int32))
    with _opened(files.read(name), name) as image:
        if image.mode == "RGB":
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if image.mode not in ("L", "P", "I", "I;16", "1", "F"):
            raise SourceError(f"{name}: expected a map of one channel, or RGB, got mode {image.mode}")
        pixels = np.array(image)  # of a palette the indices
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    elif pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 1:
        pixels = pixels.astype(np.int32)
    return torch.from_numpy(pixels)


def _opened(body: bytes, name: str) -> Any:
    image_module, operations = require("PIL.Image", "pillow"), require("PIL.ImageOps", "pillow")
    try:
        image = image_module.open(io.BytesIO(body))
        image.load()
        return operations.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, image_module.DecompressionBombError) as error:
        raise SourceError(f"cannot read {name}: {type(error).__name__}: {error}") from error
