"""Dense tensors as bytes: which tensors have them, their canonical form, and their digest.

Canonical bytes are little endian and row-major in the stored dtype, whatever the strides and device of the
tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import DtypeMismatchError, Path, UnsupportedTensorError, show
from .format import DTYPE_NAMES

CHUNK_BYTES = 16 << 20


def check_storable(name: str, tensor: object, *, path: Path, dtypes: Mapping[torch.dtype, str] = DTYPE_NAMES) -> Tensor:
    """Returns `tensor` detached if it is dense, materialised and of one of `dtypes`; raises UnsupportedTensorError if
    not.
    """

    def refuse(what: str) -> UnsupportedTensorError:
        return UnsupportedTensorError(path, f"tensor {show(name)}: expected a dense, real, local tensor, got {what}")

    if not isinstance(tensor, Tensor):
        raise refuse(type(tensor).__name__)
    if is_lazy(tensor):
        raise refuse("an uninitialised (lazy) parameter")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise refuse(f"a {type(tensor).__name__} (sharded, fake or wrapped)")  # DTensor and ShardedTensor among them
    if getattr(tensor, "_fsdp_flattened", False) or "_flat_param" in name.split("."):
        raise refuse("a flattened FSDP shard; gather the full state first")
    if tensor.is_meta:
        raise refuse("a meta tensor, which has no bytes")
    if tensor.is_quantized:
        raise refuse(f"a quantised tensor ({tensor.dtype})")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise refuse(f"layout {tensor.layout}" + (" (nested)" if tensor.is_nested else ""))
    if tensor.dtype not in dtypes:
        raise refuse(f"{tensor.dtype}, which the format does not hold")
    return tensor.detach()


class Later(NamedTuple):
    """A tensor to be written, of this type and shape, that is made or read when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


Source = Tensor | Later
"""What can be written."""


def form_of(
    name: str, source: object, *, path: Path, dtypes: Mapping[torch.dtype, str] = DTYPE_NAMES
) -> tuple[str, tuple[int, ...]]:
    """The stored type and the shape of what is to be written. Raises as :func:`check_storable`."""
    if not isinstance(source, Later):
        source = check_storable(name, source, path=path, dtypes=dtypes)
    elif source.dtype not in dtypes:
        raise UnsupportedTensorError(path, f"tensor {show(name)}: {source.dtype}, which the format does not hold")
    return dtypes[source.dtype], tuple(source.shape)


def value_of(name: str, source: Source, *, path: Path) -> Tensor:
    """The tensor itself. Raises UnsupportedTensorError where it is not what it was said to be."""
    tensor = check_storable(name, source.read() if isinstance(source, Later) else source, path=path)
    if (tensor.dtype, tuple(tensor.shape)) != (source.dtype, tuple(source.shape)):
        raise UnsupportedTensorError(
            path,
            f"tensor {show(name)}: expected {source.dtype} {list(source.shape)}, as it was to be, "
            f"got {tensor.dtype} {list(tensor.shape)}",
        )
    return tensor


def check_bool(name: str, data: memoryview, *, path: Path) -> None:
    """Raises DtypeMismatchError if the bytes of a BOOL tensor are not all 0 or 1 (torch leaves others
    undefined).
    """
    if bytes(data).strip(b"\0\1"):
        raise DtypeMismatchError(path, f"tensor {show(name)}: expected only bytes 0 and 1 for BOOL")


def to_bytes(tensor: Tensor) -> tuple[memoryview, Tensor]:
    """A view of the canonical bytes and the tensor that owns them: keep the owner for as long as the view.

    Copies nothing for contiguous CPU tensors on little-endian hosts, otherwise this one tensor.
    """
    owner = tensor.resolve_neg().cpu().contiguous()
    if sys.byteorder == "big":
        owner = swap_bytes(owner)
    return memory(owner), owner


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable, without a copy. The tensor must outlive the view."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())).cast("B")


def swap_bytes(tensor: Tensor) -> Tensor:
    """`tensor` with the bytes of every element reversed (a copy)."""
    rows = tensor.contiguous().reshape(-1, 1).view(torch.uint8)
    return rows.flip(1).contiguous().view(tensor.dtype).reshape(tensor.shape)


def chunks(data: memoryview) -> Iterator[memoryview]:
    """`data` in pieces of 16 MiB."""
    for begin in range(0, len(data), CHUNK_BYTES):
        yield data[begin : begin + CHUNK_BYTES]


class TensorHash:
    """SHA-256 over dtype, shape and bytes of one tensor, fed piece by piece."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self._hash = hashlib.sha256(json.dumps([dtype, list(shape)]).encode() + b"\n")

    def update(self, data: memoryview) -> None:
        self._hash.update(data)

    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def tensor_digest(tensor: Tensor, *, name: str = "", path: Path = "tensor_digest") -> str:
    """Digest "sha256:<hex>" over dtype, shape and canonical bytes, whatever the strides and the device.

    Raises UnsupportedTensorError for tensors without dense bytes of their own.
    """
    tensor = check_storable(name, tensor, path=path)
    hasher = TensorHash(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
    data, owner = to_bytes(tensor)
    for piece in chunks(data):
        hasher.update(piece)
    del data, owner
    return hasher.digest()
