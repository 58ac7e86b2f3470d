"""Open files: regular ones alone, read and written whole."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import BadPathError, MissingFileError, NotRegularFileError, Path, TruncatedFileError


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
        raise refused(path, error) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotRegularFileError(path, f"expected a regular file, got {file_type(status.st_mode)}")
        yield fd, status.st_size
    finally:
        os.close(fd)


def refused(path: Path, error: OSError | ValueError) -> Exception:
    """What to raise for a path that the system does not take; other errors as they are, naming the file that was asked
    for."""
    if isinstance(error, ValueError):
        return BadPathError(path, f"expected a path, got one with {error}")  # a NUL, or what has no bytes
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return BadPathError(path, f"expected a path, got one with {(error.strerror or '').lower()}")
    return type(error)(error.errno, error.strerror, os.fspath(path))


def file_type(mode: int) -> str:
    for test, word in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device")):
        if test(mode):
            return word
    return "a special file"


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
