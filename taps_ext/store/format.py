"""The container: a safetensors header, its limits, and the proof that it describes exactly the bytes in the
file.

    8 bytes    header length N, unsigned, little endian
    N bytes    JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest   tensor bytes, little endian, row-major, in offset order, without holes

Everything here is arithmetic on the header: nothing the size of a tensor is allocated, and a header that
passes `parse_header` may be trusted for its sizes. It says nothing yet about the tensors' bytes; digests do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import strict_json
from .errors import (
    DigestError,
    HeaderError,
    LayoutError,
    LimitError,
    Path,
    TensorNameError,
    TruncatedFileError,
    UnknownDtypeError,
    show,
)

FORMAT_KEY, PATCH_KEY = "taps.format", "taps.patch"  # by these a file of ours is told, and of which kind it is
FORMAT = (1, 2)  # the newest that is read; what each minor adds stands in metadata.py
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_NAME_CHARS = 512
MAX_RANK = 64
MAX_TENSOR_BYTES = (1 << 63) - 1
TOKENS_A_TENSOR = 32  # rank 19; a part's facts and names
# Of tasks and shared files, which strangers write: whatever is in one, its header is read or refused in a fraction of a
# second, the dearest that was found in 0.12 to 0.17 s (docs/format.md, benchmarks/files.py). The largest model of the
# zoo and of timm, resnest269e, has 2,447 tensors, and 2,900 with a score for each layer. Parts are as many as tensors.
MAX_TASK_TENSORS = 8_192
MAX_TASK_HEADER_BYTES = 4 << 20
MAX_ENTRIES = 1_024  # of `__metadata__`, in any file of ours; eleven are ours, and a writer adds a few
# Of the JSON in all entries together: 8,192 layers of one tensor each have 230,000, a state's 65,536 values 197,000.
MAX_ENTRY_TOKENS = 1 << 18
ALIGNMENT = 8
DIGEST_KEY = "taps.digest"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What other safetensors files hold: never in a `.taps` file, but in checkpoints. The last two are none of safetensors'.
ALL_DTYPES: dict[str, torch.dtype] = {
    **DTYPES,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "C128": torch.complex128,
    "C32": torch.complex32,
}
ALL_DTYPE_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}


class TensorInfo(NamedTuple):
    """One tensor as the header states it. `begin` and `end` are byte offsets into the data after the
    header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        return ALL_DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A validated header: tensors by name in file order, string metadata, and where the data begins in the
    file.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_begin: int
    file_bytes: int


def check_name(name: object, *, path: Path, what: str = "tensor") -> str:
    """Returns `name` if it is a string of 1 to 512 printable characters; raises TensorNameError or
    LimitError.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or name == "__metadata__":
        raise TensorNameError(path, f"{what} name {show(name)}: expected printable characters")
    if len(name) > MAX_NAME_CHARS:
        raise LimitError(
            path, f"{what} name {show(name, 48)}: {len(name)} characters, at most {MAX_NAME_CHARS} allowed"
        )
    return name


def count_bytes(name: str, dtype: str, shape: Iterable[int], *, path: Path) -> int:
    """Bytes of a dense tensor; raises LimitError where torch's 64-bit strides could overflow."""
    shape = tuple(shape)
    itemsize = ALL_DTYPES[dtype].itemsize
    if len(shape) > MAX_RANK:
        raise LimitError(path, f"tensor {show(name)}: rank {len(shape)}, at most {MAX_RANK} allowed")
    extent = itemsize  # zeros count as one here: strides multiply the other sizes all the same
    for size in shape:
        extent *= max(size, 1)
        if extent > MAX_TENSOR_BYTES:
            raise LimitError(path, f"tensor {show(name)}: shape {show(list(shape))} of {dtype} overflows 64 bits")
    return itemsize * math.prod(shape)


def plan_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, path: Path, most: int = MAX_TENSORS
) -> dict[str, TensorInfo]:
    """Places tensors given as name -> (dtype, shape): widest dtype first, then by name, so each one is
    aligned. Raises LimitError for more than `most`.
    """
    if len(tensors) > most:
        raise LimitError(path, f"{len(tensors)} tensors, at most {most} allowed")
    plan: dict[str, TensorInfo] = {}
    begin = 0
    for name in sorted(tensors, key=lambda name: (-ALL_DTYPES[tensors[name][0]].itemsize, name)):
        dtype, shape = tensors[name]
        end = begin + count_bytes(check_name(name, path=path), dtype, shape, path=path)
        plan[name] = TensorInfo(name, dtype, shape, begin, end)
        begin = end
    return plan


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, path: Path) -> bytes:
    """The canonical header with its length prefix, padded with spaces to 8 bytes. Raises LimitError."""
    return _framed(_entries(tensors), metadata, path=path)


def _entries(tensors: Mapping[str, TensorInfo]) -> str:
    """The header's text of the tensors, a comma before each."""
    return "".join(
        f',{strict_json.quoted(name)}:{{"dtype":"{tensor.dtype}","shape":[{",".join(map(str, tensor.shape))}],'
        f'"data_offsets":[{tensor.begin},{tensor.end}]}}'
        for name, tensor in tensors.items()
    )


def _framed(entries: str, metadata: Mapping[str, str], *, path: Path) -> bytes:
    text = strict_json.dumps({"__metadata__": dict(metadata)})[:-1]
    raw = (text + entries + "}").encode("utf-8")
    raw += b" " * (-len(raw) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise LimitError(path, f"a header of {len(raw)} bytes, at most {MAX_HEADER_BYTES} allowed")
    return len(raw).to_bytes(8, "little") + raw


def header_digest(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], *, path: Path) -> str:
    """SHA-256 of the canonical header without `taps.digest` itself.

    It covers the tensor table, all metadata and therefore every tensor digest: it identifies the whole file.
    """
    return _digest(_entries(tensors), metadata, path=path)


def _digest(entries: str, metadata: Mapping[str, str], *, path: Path) -> str:
    rest = {key: value for key, value in metadata.items() if key != DIGEST_KEY}
    return "sha256:" + hashlib.sha256(_framed(entries, rest, path=path)).hexdigest()


_STRANGERS = {  # what people take for a task file, by its first bytes in lower case
    b"pk\x03\x04": "a zip archive, as torch.save writes them",
    b"\x80\x02": "a pickle, as torch.save writes them",
    b"\x1f\x8b": "a gzip archive",
    b"<!doctyp": "a web page",
    b"<html": "a web page",
    b"version ": "a Git LFS pointer, whose file is yet to be fetched",
    b"{": "JSON",
}


def header_length(prefix: bytes, file_bytes: int, *, path: Path) -> int:
    """Header length from the file's first 8 bytes; raises TruncatedFileError or LimitError."""
    if len(prefix) < 8:
        raise TruncatedFileError(path, f"expected the 8 bytes of a header length, got a file of {len(prefix)} bytes")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        known = next((word for begin, word in _STRANGERS.items() if prefix.lower().startswith(begin)), None)
        why = "not a task file, nor safetensors" + (f", but {known}" if known else "?")
        raise LimitError(path, f"header length {length}, at most {MAX_HEADER_BYTES} allowed; {why}")
    if length > file_bytes - 8:
        raise TruncatedFileError(path, f"cut short: header length {length}, but only {file_bytes - 8} bytes follow")
    return length


def check_affordable(raw: bytes, *, path: Path) -> None:
    """Raises LimitError where a task's header is larger than one may be, before it costs anything."""
    if len(raw) > MAX_TASK_HEADER_BYTES:
        raise LimitError(path, f"a task's header of {len(raw)} bytes, at most {MAX_TASK_HEADER_BYTES} allowed")
    if (count := raw.count(b'"data_offsets"')) > MAX_TASK_TENSORS:  # written otherwise, they have too many tokens
        raise LimitError(path, f"{count} tensors in a task's header, at most {MAX_TASK_TENSORS} allowed")


def parse_header(
    raw: bytes,
    file_bytes: int,
    *,
    path: Path,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    most: int = MAX_TENSORS,
) -> Header:
    """Parses and proves a safetensors header (`raw` is the JSON, without the length prefix) with at most so many
    tensors of `dtypes`.

    Raises HeaderError, DuplicateKeyError, LimitError, TensorNameError, UnknownDtypeError, LayoutError,
    TruncatedFileError.
    """
    if raw[:1] != b"{":
        raise HeaderError(path, f"header: expected a JSON object, got {show(raw[:16])}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(path, f"header: not UTF-8 at byte {error.start}") from None
    table = strict_json.loads(text, path=path, where="header", max_tokens=most * TOKENS_A_TENSOR)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise HeaderError(path, f"__metadata__: expected an object, got {show(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise HeaderError(path, f"__metadata__ key {show(key)}: expected a string, got {show(value)}")
    if len(table) > most:
        raise LimitError(path, f"{len(table)} tensors in the header, at most {most} allowed")
    tensors = [_parse_tensor(name, entry, dtypes, path=path) for name, entry in table.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _prove_layout(tensors, file_bytes - 8 - len(raw), path=path)
    return Header({tensor.name: tensor for tensor in tensors}, metadata, 8 + len(raw), file_bytes)


def check_canonical(header: Header, raw: bytes, *, path: Path) -> None:
    """Raises DigestError unless `taps.digest` is there and right, HeaderError unless `raw` is the canonical
    text.

    One content has one text, so that a change to any byte of the header, escapes and padding included, is
    noticed.
    """
    stated = header.metadata.get(DIGEST_KEY)
    if stated is None:
        raise DigestError(path, f"__metadata__: expected the header digest {DIGEST_KEY!r}, got none")
    entries = _entries(header.tensors)
    actual = _digest(entries, header.metadata, path=path)
    if stated != actual:
        raise DigestError(path, f"header: {DIGEST_KEY} states {show(stated)}, its content has {actual}")
    if _framed(entries, header.metadata, path=path)[8:] != raw:
        raise HeaderError(path, "header: not in canonical form (key order, spacing or padding was changed)")


def _are_sizes(values: Any) -> bool:
    """Whether it is a list of sizes."""
    if type(values) is not list or {*map(type, values)} - {int}:
        return False
    return not values or (min(values) >= 0 and max(values) <= MAX_TENSOR_BYTES)


def _parse_tensor(name: str, entry: Any, dtypes: Mapping[str, torch.dtype], *, path: Path) -> TensorInfo:
    check_name(name, path=path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(
            path, f"tensor {show(name)}: expected exactly dtype, shape and data_offsets, got {show(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise UnknownDtypeError(path, f"tensor {show(name)}: dtype {show(dtype)}; expected one of {' '.join(dtypes)}")
    if not _are_sizes(shape):
        raise HeaderError(path, f"tensor {show(name)}: shape: expected sizes >= 0 below 2**63, got {show(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(path, f"tensor {show(name)}: data_offsets: expected two byte offsets, got {show(offsets)}")
    begin, end = offsets
    expected = count_bytes(name, dtype, shape, path=path)
    if end - begin != expected:
        raise LayoutError(
            path,
            f"tensor {show(name)}: {dtype} of shape {show(shape)} takes {expected} bytes, "
            f"data_offsets {offsets} give {end - begin}",
        )
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _prove_layout(tensors: list[TensorInfo], data_bytes: int, *, path: Path) -> None:
    end = 0
    for index, tensor in enumerate(tensors):
        if tensor.begin != end:
            before = _before(tensors, index)
            raise LayoutError(
                path,
                f"tensor {show(tensor.name)} begins at {tensor.begin} and overlaps {before}, to byte {end}"
                if tensor.begin < end
                else f"a hole of {tensor.begin - end} bytes between {before} and tensor {show(tensor.name)}",
            )
        end = tensor.end
    last = _before(tensors, len(tensors))
    if end > data_bytes:
        raise TruncatedFileError(
            path, f"cut short: {last} ends at data byte {end}, the file holds {data_bytes} data bytes"
        )
    if end < data_bytes:
        raise LayoutError(path, f"{data_bytes - end} trailing bytes after {last}")


def _before(tensors: list[TensorInfo], index: int) -> str:
    return f"tensor {show(tensors[index - 1].name)}" if index else "the header"
