"""Checkpoints of one or more safetensors files: which files they are, and a tensor of them at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from . import strict_json
from .descriptors import open_regular, read_all
from .errors import (
    DuplicateKeyError,
    HeaderError,
    KindError,
    LayoutError,
    LimitError,
    MissingFileError,
    MissingTensorError,
    Path,
    TensorNameError,
    show,
)
from .format import ALL_DTYPES, FORMAT_KEY, PATCH_KEY, Header, TensorInfo
from .io import read_container
from .journal import locked
from .tensors import check_bool, memory

INDEX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 64 << 20


class Shard(NamedTuple):
    """One open safetensors file of a checkpoint."""

    path: str
    fd: int
    header: Header
    text: bytes  # its JSON

    def read(self, info: TensorInfo) -> Tensor:
        """A tensor as it is in the file."""
        tensor = torch.empty(info.shape, dtype=info.torch_dtype, device="cpu")
        data = memory(tensor)
        os.lseek(self.fd, self.header.data_begin + info.begin, os.SEEK_SET)
        read_all(self.fd, data, path=self.path)
        if info.dtype == "BOOL":
            check_bool(info.name, data, path=self.path)
        return tensor


class Checkpoint(NamedTuple):
    """An open checkpoint: its files, and where each tensor is. `listing`: their index, if there is one."""

    path: str
    shards: list[Shard]
    tensors: dict[str, tuple[Shard, TensorInfo]]
    listing: str | None

    def forms(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (info.dtype, info.shape) for name, (_, info) in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        shard, info = self.tensors[name]
        return shard.read(info)


class Files(NamedTuple):
    """The safetensors files of a checkpoint; its index and what that says of each tensor, if there is one."""

    paths: list[str]
    listing: str | None = None
    places: Mapping[str, str] = {}


def files_of(path: Path) -> Files:
    """The files of a checkpoint: a file, a folder or an index.

    Raises:
        MissingFileError, HeaderError, LimitError, TensorNameError: there are none, or the index is not one.
        ConfigError: a folder of several checkpoints.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        return _listed(path) if path.endswith(INDEX) else Files([path])
    names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(INDEX)]
    if len(indices) > 1:
        raise ConfigError(f"{path}: expected one index, got {', '.join(indices[:3])}; name the one that is meant")
    if indices:
        return _listed(os.path.join(path, indices[0]))
    files = [os.path.join(path, name) for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if not files:
        raise MissingFileError(path, "a folder without a safetensors file")
    return Files(files)


def is_sharded(path: Path) -> bool:
    """Whether `path` is a folder or an index rather than a file."""
    return os.path.isdir(path) or os.fspath(path).endswith(INDEX)


def folder_of(path: Path) -> str:
    """The folder of a checkpoint of several files."""
    return os.fspath(path) if os.path.isdir(path) else os.path.dirname(os.fspath(path)) or "."


def beside(path: Path) -> list[str]:
    """What lies in the folder of a checkpoint of several files and is no part of it, config.json first, then by name;
    without this package's temporary files."""
    files = files_of(path)
    parts = {os.path.basename(file) for file in (*files.paths, files.listing or "")}
    names = [name for name in os.listdir(folder_of(path)) if name not in parts and not name.startswith(".taps-")]
    return sorted(names, key=lambda name: (name != "config.json", name.startswith("."), name))


def _listed(path: str) -> Files:
    with open_regular(path) as (fd, size):
        if size > _MAX_INDEX_BYTES:
            raise LimitError(path, f"an index of {size} bytes, at most {_MAX_INDEX_BYTES} allowed")
        raw = bytearray(size)
        read_all(fd, memoryview(raw), path=path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(path, f"index: not UTF-8 at byte {error.start}") from None
    content = strict_json.loads(text, path=path, where="index", max_tokens=1 << 21)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise HeaderError(path, f"index: expected a weight_map of tensors to files, got {show(places)}")
    for name, file in places.items():
        plain = isinstance(file, str) and file.isprintable() and file not in ("", ".", "..")
        if not plain or {*"/\\"} & {*file}:
            raise TensorNameError(path, f"index: tensor {show(name)}: expected a file's name, got {show(file)}")
    folder = os.path.dirname(path)
    return Files([os.path.join(folder, file) for file in sorted(set(places.values()))], path, places)


@contextmanager
def opened(path: Path, *, write: bool = False) -> Iterator[Checkpoint]:
    """A checkpoint's files, open, their headers proven. Those of a folder are locked meanwhile (`journal.locked`).

    Raises:
        TaskFileError: a file or index is not what it must be, a tensor is in two files.
    """
    with ExitStack() as stack:
        if is_sharded(path):
            stack.enter_context(locked(folder_of(path), write=write))
        files = files_of(path)
        shards: list[Shard] = []
        tensors: dict[str, tuple[Shard, TensorInfo]] = {}
        for file in files.paths:
            fd, size = stack.enter_context(open_regular(file))
            header, text = read_container(fd, size, path=file, dtypes=ALL_DTYPES)
            if ours := sorted(key for key in header.metadata if key in (FORMAT_KEY, PATCH_KEY)):
                raise KindError(file, f"key {ours[0]!r}: expected a plain checkpoint, got a file of taps_ext's own")
            shards.append(Shard(file, fd, header, text))
            for name, info in header.tensors.items():
                if name in tensors:
                    raise DuplicateKeyError(file, f"tensor {show(name)}: is in {tensors[name][0].path} as well")
                tensors[name] = (shards[-1], info)
        if files.listing is not None:
            _check_index(files.listing, files.places, tensors)
        yield Checkpoint(os.fspath(path), shards, tensors, files.listing)


def _check_index(index: str, places: Mapping[str, str], tensors: Mapping[str, tuple[Shard, TensorInfo]]) -> None:
    for name, file in places.items():
        if name not in tensors or os.path.basename(tensors[name][0].path) != file:
            raise MissingTensorError(index, f"tensor {show(name)}: expected it in {show(file)}, as the index says")
    if surplus := sorted(tensors.keys() - places.keys()):
        raise LayoutError(index, f"tensor {show(surplus[0])}: is in {tensors[surplus[0]][0].path}, not in the index")


def check_machine() -> None:
    """Raise ConfigError where numbers lie in memory otherwise than in files."""
    if sys.byteorder != "little":
        raise ConfigError(
            "checkpoint: expected a little-endian machine, whose numbers lie in memory as they do in files"
        )
