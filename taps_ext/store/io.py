"""Files on disk: durable, atomic writes, and reads that check before they hand anything out.

`write` streams: it holds no second copy of the payload, and other processes see the old file or the whole new
one. `read` works on one open descriptor and needs the tensors' size in memory, plus one tensor where it
copies to a device.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: temporary files of killed writers stay
    fcntl = None  # type: ignore[assignment]

from ..errors import TaskFileError
from .errors import (
    BadPathError,
    DigestError,
    DtypeMismatchError,
    GateRecordError,
    MissingFileError,
    MissingTensorError,
    NotRegularFileError,
    Path,
    ShapeMismatchError,
    TruncatedFileError,
    UnexpectedTensorError,
    show,
)
from .format import (
    DIGEST_KEY,
    DTYPE_NAMES,
    DTYPES,
    Header,
    TensorInfo,
    check_canonical,
    encode_header,
    header_digest,
    header_length,
    parse_header,
    plan_layout,
)
from .metadata import Metadata, check_kind, check_version, parse_digests, parse_metadata
from .strict_json import dumps
from .table import Claim
from .tensors import CHUNK_BYTES, TensorHash, check_bool, check_storable, chunks, memory, swap_bytes, to_bytes


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


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata) -> int:
    """Writes a task file and returns its size in bytes. `tensors` are by stored name, exactly
    `metadata.claims`.

    The same input gives the same bytes. The file appears at once and only when it is on disk: temporary file
    in the same folder, fsync, rename, fsync of the folder; whatever is raised on the way (KeyboardInterrupt
    too), the old file is left as it was and the temporary one is removed. A new file's mode follows the
    umask, an existing one keeps its mode. A symbolic link stays, and the file that it points to is replaced,
    as with a plain `open`.

    Raises UnsupportedTensorError, MissingTensorError, UnexpectedTensorError, GateRecordError, the errors of
    `Metadata.validate`, MissingFileError (no such folder), NotRegularFileError, and OSError from the disk.
    """
    strings = metadata.to_strings(path=path)
    sources = {name: check_storable(name, tensor, path=path) for name, tensor in tensors.items()}
    plan = plan_layout({n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in sources.items()}, path=path)
    claims = metadata.claims()
    check_claims(claims, plan, path=path)
    strings["taps.digests"] = dumps({name: "sha256:" + "0" * 64 for name in plan})
    strings[DIGEST_KEY] = "sha256:" + "0" * 64
    draft = encode_header(plan, strings, path=path)  # digests have one length, so the header's is known already
    digests: dict[str, str] = {}
    with replacing(path) as fd:
        write_all(fd, memoryview(draft))
        for name, info in plan.items():
            data, owner = to_bytes(sources[name])
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


def read(path: Path, *, verify: bool = True, device: torch.device | str = "cpu") -> TensorFile:
    """Reads a task file. The header is proven before tensors are allocated, and no tensor is returned before
    all match their digests. `verify=False` skips the tensor digests (for a file verified before), never the
    header's.

    Raises MissingFileError, NotRegularFileError, the errors of `read_header`, and DigestError,
    TruncatedFileError, GateRecordError (a score that is not finite), DtypeMismatchError (bytes that are no
    booleans).
    """
    tensors: dict[str, Tensor] = {}
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path)
        for name, info in header.tensors.items():
            expected = header.digests[name] if verify else None
            tensors[name] = _read_tensor(fd, info, header.claims[name], expected, path=path).to(device)
    return TensorFile(header, tensors)


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileHeader, Callable[[str], Tensor]]]:
    """A file's header, proven, and what reads one of its tensors by its stored name and proves it, while the file stays
    open. Raises as :func:`read`.
    """
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path)
        data = size - sum(info.nbytes for info in header.tensors.values())

        def fetch(name: str) -> Tensor:
            info = header.tensors[name]
            os.lseek(fd, data + info.begin, os.SEEK_SET)
            return _read_tensor(fd, info, header.claims[name], header.digests[name], path=path)

        yield header, fetch


def read_header(path: Path, *, kind: str | None = None) -> FileHeader:
    """Reads and validates everything but the tensors' bytes: milliseconds for any file.

    Raises KindError if the file is not of `kind` (where given), MissingFileError, NotRegularFileError, the errors of
    `format.parse_header` and `metadata.parse_metadata`, DigestError, MissingTensorError, UnexpectedTensorError,
    GateRecordError, CodecError, ShapeMismatchError and DtypeMismatchError (of scores).
    """
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path)
    check_kind(kind, header.metadata.kind, path=path)
    return header


def verify(path: Path) -> Verification:
    """Compares every tensor with its digest, 16 MiB at a time. Header errors raise as in `read_header`."""
    damaged: list[str] = []
    with open_regular(path) as (fd, size):
        header = _file_header(fd, size, path=path)
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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Writes a plain safetensors file (base weights, say) as durably as `write` does; returns its bytes.

    Raises UnsupportedTensorError, TensorNameError, LimitError, MissingFileError, NotRegularFileError, and
    OSError from the disk.
    """
    sources = {name: check_storable(name, tensor, path=path) for name, tensor in tensors.items()}
    plan = plan_layout({n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in sources.items()}, path=path)
    header = encode_header(plan, metadata or {}, path=path)
    with replacing(path) as fd:
        write_all(fd, memoryview(header))
        for name in plan:
            data, owner = to_bytes(sources[name])
            write_all(fd, data)
            del data, owner
    return len(header) + sum(info.nbytes for info in plan.values())


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file as durably as `write` does: once it returns, the text outlives a loss of power.

    Raises MissingFileError, NotRegularFileError, and OSError from the disk.
    """
    with replacing(path) as fd:
        write_all(fd, memoryview(text.encode("utf-8")))


def copy(source: Path, target: Path, *, replace: bool) -> int:
    """Copies a task file as durably as `write` does; returns its bytes. What comes to be at `target` is proven before.

    Raises FileExistsError where there is a file and `replace` is False: of two that copy to one place only one does.
    Raises as `verify`, DigestError, and OSError from the disk.
    """
    with open_regular(source) as (fd, size):
        new = Replacement(target)
        try:
            buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, size))))
            for begin in range(0, size, len(buffer)):
                piece = buffer[: min(len(buffer), size - begin)]
                read_all(fd, piece, path=source)
                write_all(new.fd, piece)
            if damaged := verify(new.temporary).damaged:
                raise DigestError(source, f"tensor {show(damaged[0])}: its bytes are not those that were written")
            new.seal()
            if replace:
                new.rename()
            else:
                os.link(new.temporary, new.target)
                new.drop()
        except BaseException as error:
            new.drop()
            if isinstance(error, TaskFileError):
                raise type(error)(source, error.problem) from None  # not the temporary file's path
            if (named := _naming(error, target)) is not error:
                raise named from None
            raise
    sync_folder(new.folder)
    return size


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
    prefix = bytearray(min(8, size))
    read_all(fd, memoryview(prefix), path=path)
    raw = bytearray(header_length(bytes(prefix), size, path=path))
    read_all(fd, memoryview(raw), path=path)
    return parse_header(bytes(raw), size, path=path, dtypes=dtypes), bytes(raw)


def _file_header(fd: int, size: int, *, path: Path) -> FileHeader:
    header, raw = read_container(fd, size, path=path)
    check_version(header.metadata, path=path)
    check_canonical(header, raw, path=path)
    metadata = parse_metadata(header.metadata, path=path)
    digests = parse_digests(header.metadata, header.tensors, path=path)
    claims = metadata.claims()
    check_claims(claims, header.tensors, path=path)
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


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor and its size. Opening never blocks, even on a pipe; what is checked is what is then
    read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(path, "no such file") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # a socket
            raise NotRegularFileError(path, "expected a regular file, got a socket or device") from None
        raise _refused(path, error) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularFileError(path, f"expected a regular file, got {_file_type(status.st_mode)}")
        yield fd, status.st_size
    finally:
        os.close(fd)


def _refused(path: Path, error: OSError | ValueError) -> Exception:
    """What to raise for a path that the system does not take; other errors as they are, naming the file that was asked
    for."""
    if isinstance(error, ValueError):
        return BadPathError(path, f"expected a path, got one with {error}")  # a NUL, or what has no bytes
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return BadPathError(path, f"expected a path, got one with {(error.strerror or '').lower()}")
    return type(error)(error.errno, error.strerror, os.fspath(path))


def _file_type(mode: int) -> str:
    for test, word in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device")):
        if test(mode):
            return word
    return "a special file"


class Replacement:
    """A temporary file beside `path` that can take its place.

    It is locked for as long as its writer lives, so that `sweep` tells what a killed one has left.
    """

    def __init__(self, path: Path, ending: str = ".tmp") -> None:
        self.path = path
        mode = None
        try:
            self.target = os.path.realpath(path)
            self.folder = os.path.dirname(self.target)
            mode = os.stat(self.target).st_mode
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            raise _refused(path, error) from None
        if mode is not None and not stat.S_ISREG(mode):
            raise NotRegularFileError(path, f"expected a file to replace, got {_file_type(mode)}")
        sweep(self.folder, ending)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self.fd = -1
        self.temporary = ""
        while self.fd < 0:
            self.temporary = os.path.join(self.folder, f".taps-{secrets.token_hex(8)}{ending}")
            try:
                self.fd = os.open(self.temporary, flags, 0o666)  # the kernel applies the umask
            except (FileNotFoundError, NotADirectoryError):
                raise MissingFileError(path, f"no such folder: {self.folder}") from None
            except (OSError, ValueError) as error:
                raise _refused(path, error) from None
            _lock(self.fd)
            if not _is_at(self.fd, self.temporary):  # swept before it was locked
                os.close(self.fd)
                self.fd = -1
        try:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(self.fd, stat.S_IMODE(mode) & 0o777)
        except BaseException:
            self.drop()
            raise

    def seal(self) -> None:
        """All that was written is on the disk."""
        os.fsync(self.fd)

    def rename(self) -> None:
        """It is the file at `path` now, durably once the folder is synchronised."""
        os.replace(self.temporary, self.target)
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def drop(self) -> None:
        """Remove it, if that can be: whoever does so has something worse to say."""
        self.close()
        with suppress(OSError):
            os.unlink(self.temporary)


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor to write; on leaving without an exception, its file durably takes the place of `path`."""
    new = Replacement(path)
    try:
        yield new.fd
        new.seal()
        new.rename()
    except BaseException as error:
        new.drop()
        if (named := _naming(error, path)) is not error:
            raise named from None
        raise
    sync_folder(new.folder)


def _naming(error: BaseException, path: Path) -> BaseException:
    """The same error; one of the system that names no file (a full disk, say) names the one that was to be written."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return type(error)(error.errno, error.strerror, os.fspath(path))
    return error


def sweep(folder: str, ending: str = ".tmp") -> None:
    """Remove the temporary files of writers that were killed; those of living ones are locked, and stay."""
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name) and name.endswith(ending)]
    except OSError:  # whoever asked is about to say what is wrong with the folder
        return
    for name in names:
        path = os.path.join(folder, name)
        with suppress(OSError):  # somebody else's, or gone: tidying is no reason to fail
            fd = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
            try:
                if _lock(fd) and _is_at(fd, path):
                    os.unlink(path)
            finally:
                os.close(fd)


_TEMPORARY = re.compile(r"\.taps-[0-9a-f]{16}\.[a-z]+")


def _lock(fd: int) -> bool:
    """Whether this process holds the file now; False too where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def sync_folder(folder: str) -> None:
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def read_all(fd: int, view: memoryview, *, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.readv(fd, [view[done:]])
        if count == 0:
            raise TruncatedFileError(path, f"ended while being read, {len(view) - done} bytes short")
        done += count
