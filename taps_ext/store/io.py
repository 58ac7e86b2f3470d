"""Task files on disk: written tensor by tensor, and read with a check before anything is handed out.

`write` streams: it holds no second copy of the payload, and other processes see the old file or the whole new
one (durable.py). `read` works on one open descriptor and needs the tensors' size in memory, plus one tensor where it
copies to a device.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TaskFileError
from . import durable
from .descriptors import open_regular, read_all, write_all
from .durable import replacing
from .errors import (
    DigestError,
    DtypeMismatchError,
    GateRecordError,
    MissingTensorError,
    Path,
    ShapeMismatchError,
    UnexpectedTensorError,
    show,
)
from .format import (
    DIGEST_KEY,
    DTYPES,
    MAX_TASK_TENSORS,
    MAX_TENSORS,
    Header,
    TensorInfo,
    check_affordable,
    check_canonical,
    encode_header,
    header_digest,
    header_length,
    parse_header,
    plan_layout,
)
from .metadata import (
    Metadata,
    check_entries,
    check_kind,
    check_tokens,
    check_version,
    entry_tokens,
    is_state,
    parse_digests,
    parse_metadata,
)
from .strict_json import dumps
from .table import Claim
from .tensors import (
    CHUNK_BYTES,
    Source,
    TensorHash,
    check_bool,
    chunks,
    form_of,
    memory,
    swap_bytes,
    to_bytes,
    value_of,
)

_STATE_MARKS = (  # the second is of 0.1: see metadata.py
    b'"taps.kind":"state"',
    b'"taps.method":"{\\"method\\":\\"trainer-state\\"}"',
)


@dataclass(frozen=True)
class FileHeader:
    """All of a task file but its tensors' bytes, validated.

    `digest` identifies the whole file (a task trained on a shared file names it as parent). `tensors` maps
    stored names to dtype, shape and offsets, `claims` to what they are, `digests` to "sha256:<hex>".
    `file_bytes` in bytes.
    """

    path: str
    file_bytes: int
    digest: str
    tensors: Mapping[str, TensorInfo]
    metadata: Metadata
    claims: Mapping[str, Claim]
    digests: Mapping[str, str]

    @property
    def data_begin(self) -> int:
        """Where the tensors' bytes begin in the file."""
        return self.file_bytes - sum(info.nbytes for info in self.tensors.values())


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A file as read: its header and its tensors by stored name, in file order."""

    header: FileHeader
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """Result of `verify`: the header, and the stored names of tensors whose bytes are not those written."""

    header: FileHeader
    damaged: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.damaged

    @property
    def problem(self) -> str | None:
        """What is wrong, in words."""
        if self.ok:
            return None
        first, *more = self.damaged
        others = f" (and {len(more)} more)" if more else ""
        return f"tensor {show(first)}{others}: its bytes are not those that were written"


def write(path: Path, tensors: Mapping[str, Source], metadata: Metadata) -> int:
    """Writes a task file and returns its size in bytes. `tensors` are by stored name, exactly
    `metadata.claims`; of those that come later one is in memory at a time.

    The same input gives the same bytes. The file appears at once and only when it is on disk: temporary file
    in the same folder, fsync, rename, fsync of the folder; whatever is raised on the way (KeyboardInterrupt
    too), the old file is left as it was and the temporary one is removed. A new file's mode follows the
    umask, an existing one keeps its mode. A symbolic link stays, and the file that it points to is replaced,
    as with a plain `open`.

    Raises UnsupportedTensorError, MissingTensorError, UnexpectedTensorError, GateRecordError, the errors of
    `Metadata.validate`, MissingFileError (no such folder), NotRegularFileError, and OSError from the disk.
    """
    strings = metadata.to_strings(path=path)
    forms = {name: form_of(name, source, path=path) for name, source in tensors.items()}
    plan = plan_layout(forms, path=path, most=MAX_TENSORS if metadata.kind == "state" else MAX_TASK_TENSORS)
    claims = metadata.claims()
    check_claims(claims, plan, path=path)
    strings["taps.digests"] = dumps({name: "sha256:" + "0" * 64 for name in plan})
    strings[DIGEST_KEY] = "sha256:" + "0" * 64
    check_entries(strings, path=path)
    check_tokens(strings, path=path)
    draft = encode_header(plan, strings, path=path)  # digests have one length, so the header's is known already
    if metadata.kind != "state":
        check_affordable(draft[8:], path=path)
    digests: dict[str, str] = {}
    with replacing(path) as fd:
        write_all(fd, memoryview(draft))
        for name, info in plan.items():
            data, owner = to_bytes(value_of(name, tensors[name], path=path))
            hasher = TensorHash(info.dtype, info.shape)
            for piece in chunks(data):
                _check_piece(info, claims[name], piece, path=path)
                hasher.update(piece)
                write_all(fd, piece)
            digests[name] = hasher.digest()
            del data, owner
        strings["taps.digests"] = dumps(digests)
        strings[DIGEST_KEY] = header_digest(plan, strings, path=path)
        os.lseek(fd, 0, os.SEEK_SET)
        write_all(fd, memoryview(encode_header(plan, strings, path=path)))
    return len(draft) + sum(info.nbytes for info in plan.values())


def read(path: Path, *, verify: bool = True, device: torch.device | str = "cpu", kind: str | None = None) -> TensorFile:
    """Reads a task file. The header is proven before tensors are allocated, and no tensor is returned before
    all match their digests. `verify=False` skips the tensor digests (for a file verified before), never the
    header's.

    Raises KindError (not of `kind`, where given), MissingFileError, NotRegularFileError, the errors of `read_header`,
    and DigestError, TruncatedFileError, GateRecordError (a score that is not finite), DtypeMismatchError (bytes
    that are no booleans).
    """
    tensors: dict[str, Tensor] = {}
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path, kind=kind)
        for name, info in header.tensors.items():
            expected = header.digests[name] if verify else None
            tensors[name] = _read_tensor(fd, info, header.claims[name], expected, path=path).to(device)
    return TensorFile(header, tensors)


@contextmanager
def opened(path: Path, *, kind: str | None = None) -> Iterator[tuple[FileHeader, Callable[[str], Tensor]]]:
    """A file's header, proven, and what reads one of its tensors by its stored name and proves it, while the file stays
    open. Raises as :func:`read`.
    """
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path, kind=kind)
        data = header.data_begin

        def fetch(name: str) -> Tensor:
            info = header.tensors[name]
            os.lseek(fd, data + info.begin, os.SEEK_SET)
            return _read_tensor(fd, info, header.claims[name], header.digests[name], path=path)

        yield header, fetch


def read_header(path: Path, *, kind: str | None = None, states: bool = True) -> FileHeader:
    """Reads and validates everything but the tensors' bytes. `states`: whether it may be as large as a state's.

    Raises KindError if the file is not of `kind` (where given), MissingFileError, NotRegularFileError, the errors of
    `format.parse_header` and `metadata.parse_metadata`, DigestError, MissingTensorError, UnexpectedTensorError,
    GateRecordError, CodecError, ShapeMismatchError and DtypeMismatchError (of scores).
    """
    with open_regular(path) as (fd, size):
        return _file_header(fd, size, path=path, kind=kind, states=states)


def verify(path: Path, *, states: bool = True) -> Verification:
    """Compares every tensor with its digest, 16 MiB at a time. Header errors raise as in `read_header`."""
    damaged: list[str] = []
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path, states=states)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        for name, info in header.tensors.items():
            hasher = TensorHash(info.dtype, info.shape)
            bad = False
            for begin in range(0, info.nbytes, CHUNK_BYTES):
                piece = buffer[: min(CHUNK_BYTES, info.nbytes - begin)]
                read_all(fd, piece, path=path)
                hasher.update(piece)
                try:
                    _check_piece(info, header.claims[name], piece, path=path)
                except (GateRecordError, DtypeMismatchError):
                    bad = True
            bad = bad or hasher.digest() != header.digests[name]
            if bad:
                damaged.append(name)
    return Verification(header, tuple(damaged))


def sound(path: Path) -> tuple[FileHeader | None, str | None]:
    """The header of a file whose bytes are all those that were written, else what is wrong with it, in words."""
    try:
        found = verify(path)
    except TaskFileError as error:
        return None, error.problem
    except OSError as error:
        return None, error.strerror or str(error)
    return (found.header if found.ok else None), found.problem


def copy(source: Path, target: Path, *, replace: bool) -> int:
    """Copies a task's or shared file as durably as `write` does; returns its bytes. What comes to be at `target` is
    proven before.

    Raises FileExistsError where there is a file and `replace` is False: of two that copy to one place only one does.
    Raises as `verify` (LimitError for a state that is larger than a task may be), DigestError, and OSError from the
    disk.
    """

    def prove(temporary: str) -> None:
        if (problem := verify(temporary, states=False).problem) is not None:
            raise DigestError(source, problem)

    return durable.copy(source, target, replace=replace, prove=prove)


def read_safetensors(path: Path, *, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file (base weights, say) in our dtypes, with the same proof of
    layout.

    Nothing vouches for the values: such files carry no digests. Raises as `format.parse_header` does.
    """
    with open_regular(path) as (fd, size):
        header, _ = read_container(fd, size, path=path)
        plain = Claim("", "")
        tensors = {n: _read_tensor(fd, t, plain, None, path=path).to(device) for n, t in header.tensors.items()}
    return tensors, dict(header.metadata)


def write_safetensors(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str] | None = None) -> int:
    """Writes a plain safetensors file (base weights, say) as durably as `write` does; returns its bytes. Of tensors
    that come later one is in memory at a time.

    Raises UnsupportedTensorError, TensorNameError, LimitError, MissingFileError, NotRegularFileError, and
    OSError from the disk.
    """
    plan = plan_layout({name: form_of(name, source, path=path) for name, source in tensors.items()}, path=path)
    header = encode_header(plan, metadata or {}, path=path)
    with replacing(path) as fd:
        write_all(fd, memoryview(header))
        for name in plan:
            data, owner = to_bytes(value_of(name, tensors[name], path=path))
            write_all(fd, data)
            del data, owner
    return len(header) + sum(info.nbytes for info in plan.values())


def check_claims(claims: Mapping[str, Claim], tensors: Mapping[str, TensorInfo], *, path: Path) -> None:
    """Raises unless the tensors are exactly the claimed ones, and every score is a float32 scalar."""
    for stored, claim in claims.items():
        info = tensors.get(stored)
        if info is None:
            raise MissingTensorError(
                path, f"tensor {show(stored)}: expected one, as the file's table lists it, got none"
            )
        if claim.score and info.dtype != "F32":
            raise DtypeMismatchError(path, f"tensor {show(stored)}: expected an F32 score, got {info.dtype}")
        if claim.score and info.shape != ():
            raise ShapeMismatchError(
                path, f"tensor {show(stored)}: expected a score of shape [], got {show(list(info.shape))}"
            )
    for stored in tensors:
        if stored not in claims:
            raise UnexpectedTensorError(path, f"tensor {show(stored)}: nothing in the file's table claims it")


def read_container(
    fd: int, size: int, *, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> tuple[Header, bytes]:
    """The proven header at the start of an open file of `size` bytes, and its text; the data are next in the file."""
    raw = _header_text(fd, size, path=path)
    return parse_header(raw, size, path=path, dtypes=dtypes), raw


def _header_text(fd: int, size: int, *, path: Path) -> bytes:
    prefix = bytearray(min(8, size))
    read_all(fd, memoryview(prefix), path=path)
    raw = bytearray(header_length(bytes(prefix), size, path=path))
    read_all(fd, memoryview(raw), path=path)
    return bytes(raw)


def _task_header(raw: bytes, size: int, *, path: Path) -> Header:
    """A header within the limits of a task's."""
    check_affordable(raw, path=path)
    return parse_header(raw, size, path=path, most=MAX_TASK_TENSORS)


def _file_header(fd: int, size: int, *, path: Path, kind: str | None = None, states: bool = True) -> FileHeader:
    """What a file of this kind (None: of any) says. A header that costs more than a task's may is parsed for a state's
    sake alone, and never where `states` is False.
    """
    raw = _header_text(fd, size, path=path)
    marked = states and kind in (None, "state") and any(mark in raw for mark in _STATE_MARKS)
    header = parse_header(raw, size, path=path) if marked else _task_header(raw, size, path=path)
    if marked and not is_state(header.metadata):  # the mark is of another key
        header = _task_header(raw, size, path=path)
    check_version(header.metadata, path=path)
    check_entries(header.metadata, path=path)
    check_canonical(header, raw, path=path)
    tokens = entry_tokens()
    metadata = parse_metadata(header.metadata, path=path, tokens=tokens)
    digests = parse_digests(header.metadata, header.tensors, path=path, tokens=tokens)
    claims = metadata.claims()
    check_claims(claims, header.tensors, path=path)
    check_kind(kind, metadata.kind, path=path)
    return FileHeader(os.fspath(path), size, header.metadata[DIGEST_KEY], header.tensors, metadata, claims, digests)


def _read_tensor(fd: int, info: TensorInfo, claim: Claim, expected: str | None, *, path: Path) -> Tensor:
    tensor = torch.empty(info.shape, dtype=info.torch_dtype, device="cpu")
    hasher = TensorHash(info.dtype, info.shape)
    for piece in chunks(memory(tensor)):
        read_all(fd, piece, path=path)
        if expected is not None:
            hasher.update(piece)
    if expected is not None and hasher.digest() != expected:
        raise DigestError(path, f"tensor {show(info.name)}: expected {expected}, got bytes of {hasher.digest()}")
    for piece in chunks(memory(tensor)):
        _check_piece(info, claim, piece, path=path)
    return swap_bytes(tensor) if sys.byteorder == "big" else tensor


def _check_piece(info: TensorInfo, claim: Claim, piece: memoryview, *, path: Path) -> None:
    """Values that a right digest does not excuse: booleans other than 0 and 1, scores that are not finite."""
    if info.dtype == "BOOL":
        check_bool(info.name, piece, path=path)
    if claim.score:
        (score,) = struct.unpack("<f", piece)
        if not math.isfinite(score):
            raise GateRecordError(path, f"tensor {show(info.name)}: expected a finite score, got {score}")
