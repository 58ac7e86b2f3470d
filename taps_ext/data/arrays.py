"""Sources from arrays: `npz:FILE` and the checks that any array of images or labels passes.

Accepted images: uint8 (0..255) or floating point in [0, 1], shaped [N, H, W], [N, H, W, C] or [N, C, H, W]
with C = 1 or 3; when both readings fit, the channels are last. Accepted labels: integers [N], 0 .. classes -
1.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SourceError
from .source import ArrayDataset, Options, Source, finish, resize, split_generator

KEYS = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "classes")


def images_from(array: Any, what: str) -> Tensor:
    """Float32 images [N, C, H, W] in [0, 1] from a NumPy array or tensor; `what` names it in errors.

    Raises:
        SourceError: unsupported dtype, shape or range of values.
    """
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise SourceError(f"{what}: expected uint8 or floating-point images, got {array.dtype}")
    if array.ndim not in (3, 4) or 0 in array.shape:
        expected = "non-empty [N, H, W], [N, H, W, C] or [N, C, H, W]"
        raise SourceError(f"{what}: expected {expected}, got {list(array.shape)}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.shape[1] not in (1, 3):
        raise SourceError(f"{what}: expected 1 or 3 channels, first or last, got {list(array.shape)}")
    x = torch.from_numpy(np.ascontiguousarray(array).astype(np.float32))
    if array.dtype == np.uint8:
        return x.div_(255)
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 1):
        raise SourceError(f"{what}: expected floating-point values in [0, 1], got {low:.4g} .. {high:.4g}")
    return x


def labels_from(array: Any, what: str, count: int) -> Tensor:
    """Int64 labels [count] from a NumPy array, tensor or list; `what` names it in errors.

    Raises:
        SourceError: not integers, not one-dimensional, negative, or not `count` of them.
    """
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise SourceError(f"{what}: expected integer labels [N], got {array.dtype} {list(array.shape)}")
    if len(array) != count:
        raise SourceError(f"{what}: {len(array)} labels for {count} images")
    if len(array) and int(array.min()) < 0:
        raise SourceError(f"{what}: labels start at 0, got {int(array.min())}")
    return torch.from_numpy(array.astype(np.int64))


def source_from_arrays(
    name: str,
    arrays: Mapping[str, Any],
    options: Options,
    limits: Mapping[str, int] | None = None,
    description: str = "",
) -> Source:
    """A source from arrays under the keys x_train, y_train, x_test, y_test, and maybe x_val, y_val, classes.

    Args:
        name: of the source, also in errors.
        arrays: NumPy arrays or tensors; images keep the geometry they have where `options` leaves it open.
        limits: at most so many images per split, random but fixed (for train: by the seed).

    Raises:
        SourceError: a key is missing or unknown, or an array is unsuitable.
    """
    unknown = sorted(set(arrays) - set(KEYS))
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if ("x_val" in arrays) != ("y_val" in arrays):
        missing.append("y_val" if "x_val" in arrays else "x_val")
    if unknown or missing:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise SourceError(f"{name}: {problem}; the keys are {', '.join(KEYS)} (val and classes optional)")
    splits: dict[str, ArrayDataset] = {}
    for split in ("train", "val", "test"):
        if f"x_{split}" not in arrays:
            continue
        x = images_from(arrays[f"x_{split}"], f"{name}: x_{split}")
        y = labels_from(arrays[f"y_{split}"], f"{name}: y_{split}", len(x))
        limit = (limits or {}).get(split, len(x))
        if limit < len(x):
            rows = torch.randperm(len(x), generator=split_generator(options.seed, split))[:limit].sort().values
            x, y = x[rows], y[rows]
        splits[split] = ArrayDataset(finish(resize(x, options.size), options.channels, options.normalize), y)
    shapes = {tuple(data.x.shape[1:]) for data in splits.values()}
    if len(shapes) > 1:
        raise SourceError(f"{name}: the splits differ in image shape: {', '.join(map(str, sorted(shapes)))}")
    if "classes" in arrays:
        classes = tuple(str(label) for label in np.asarray(arrays["classes"]).ravel())
    else:
        classes = tuple(str(label) for label in range(1 + max(int(data.y.max()) for data in splits.values())))
    return Source(
        name,
        splits["train"],
        splits.get("val"),
        splits["test"],
        classes=classes,
        description=description,
        normalize=options.normalize,
    )


def parse_limits(path: str, spec: str) -> tuple[str, dict[str, int]]:
    """Split `FILE?train=2000&test=500` into file and limits; a `?` in an existing file's name is left alone.

    Raises:
        SourceError: an option is not one of train=N, val=N, test=N with N >= 1.
    """
    if "?" not in path or Path(path).exists():
        return path, {}
    path, _, query = path.rpartition("?")
    limits: dict[str, int] = {}
    for option in query.split("&"):
        match = re.fullmatch(r"(train|val|test)=([1-9][0-9]{0,11})", option)
        if match is None or match[1] in limits:
            raise SourceError(f"{spec}: bad option {option!r}, expected train=N, val=N or test=N, joined by '&'")
        limits[match[1]] = int(match[2])
    return path, limits


def open_npz(rest: str, options: Options) -> Source:
    """`npz:FILE` or `npz:FILE?train=2000`: the arrays of `source_from_arrays` in an archive; no pickle.

    Raises:
        SourceError: the file is missing, damaged, holds Python objects, or an array is unsuitable.
    """
    spec = f"npz:{rest}"
    path, limits = parse_limits(rest, spec)
    if not Path(path).is_file():
        raise SourceError(f"npz: no such file: {path}")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise SourceError(f"{path}: expected an .npz archive of named arrays, got a single array")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except SourceError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read as .npz without pickle: {error}") from error
    for split in limits:
        if f"x_{split}" not in arrays:
            raise SourceError(f"{spec}: limits {split}, but the file has no x_{split}")
    description = f"arrays of {Path(path).name}; splits as stored"
    return source_from_arrays(spec, arrays, options, limits, description)
