"""Durable, atomic writing: a file appears whole, on the disk, or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows: temporary files of killed writers stay
    fcntl = None  # type: ignore[assignment]

from ..errors import TaskFileError
from .descriptors import file_type, open_regular, read_all, refused, write_all
from .errors import MissingFileError, NotRegularFileError, Path
from .tensors import CHUNK_BYTES


def target_of(path: Path) -> tuple[str, int | None]:
    """Where a path's links lead, and the mode of the file that is there (None: there is none).

    Raises BadPathError, NotRegularFileError (a folder, say), and OSError: nothing could be written there.
    """
    mode = None
    try:
        target = os.path.realpath(path)
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(target).st_mode
    except (OSError, ValueError) as error:
        raise refused(path, error) from None
    if mode is not None and not stat.S_ISREG(mode):
        raise NotRegularFileError(path, f"expected a file to replace, got {file_type(mode)}")
    return target, mode


class Replacement:
    """A temporary file beside `path` that can take its place.

    It is locked for as long as its writer lives, so that `sweep` tells what a killed one has left.
    """

    def __init__(self, path: Path, ending: str = ".tmp") -> None:
        self.path = path
        self.target, mode = target_of(path)
        self.folder = os.path.dirname(self.target)
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
                if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    what = f"expected a folder to make files in: {error.strerror}"
                    raise type(error)(error.errno, what, self.folder) from None
                raise refused(path, error) from None
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
        if (named := naming(error, path)) is not error:
            raise named from None
        raise
    sync_folder(new.folder)


def naming(error: BaseException, path: Path) -> BaseException:
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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file: once it returns, the text outlives a loss of power.

    Raises MissingFileError, NotRegularFileError, and OSError from the disk.
    """
    with replacing(path) as fd:
        write_all(fd, memoryview(text.encode("utf-8")))


def copy(source: Path, target: Path, *, replace: bool, prove: Callable[[str], None]) -> int:
    """Copies a file; returns its bytes. `prove` is given the path of what is about to be at `target`, and raises where
    it may not be there.

    Raises FileExistsError where there is a file and `replace` is False: of two that copy to one place only one does.
    Raises what `prove` does, a TaskFileError as one of `source`; and OSError from the disk.
    """
    with open_regular(source) as (fd, size):
        new = Replacement(target)
        try:
            buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, size))))
            for begin in range(0, size, len(buffer)):
                piece = buffer[: min(len(buffer), size - begin)]
                read_all(fd, piece, path=source)
                write_all(new.fd, piece)
            prove(new.temporary)
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
            if (named := naming(error, target)) is not error:
                raise named from None
            raise
    sync_folder(new.folder)
    return size
