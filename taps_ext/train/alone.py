"""One run in a folder: two that write the same states and files would leave neither's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two runs at once are then the caller's to avoid
    fcntl = None  # type: ignore[assignment]

LOCK = ".taps-train.lock"
_held: set[int] = set()


def _let_go() -> None:
    """In a forked process: what it inherits would keep the lock while it lives, as workers outlive a killed run."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone(out: Path | None) -> Iterator[None]:
    """No other run trains into the folder meanwhile, in this process or another. The lock is the system's: it ends with
    the process that holds it, however that ends, and the file that may then be left means nothing.

    Raises:
        ConfigError: another run does.
    """
    fd = -1 if out is None or fcntl is None else _taken(out / LOCK)
    try:
        yield
    finally:
        if fd in _held and out is not None:
            with suppress(OSError):
                (out / LOCK).unlink()  # while it is locked, so that nobody locks a file that is about to go
            _held.remove(fd)
            os.close(fd)


def _taken(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return -1  # a folder that takes no file takes no run either: what is finished in it can be read
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(fd, 20).decode("ascii", "replace").strip()
            os.close(fd)
            raise ConfigError(
                f"out: expected a folder that no other run trains into, got {path.parent}, into which process "
                f"{who or 'unknown'} does; wait for it, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(fd)
            return -1
        if _is_at(fd, path):
            with suppress(OSError):  # the disk may be full; the number is for people
                os.ftruncate(fd, 0)
                os.write(fd, str(os.getpid()).encode())
            _held.add(fd)
            return fd
        os.close(fd)  # the run that held it has just ended, and removed it


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
