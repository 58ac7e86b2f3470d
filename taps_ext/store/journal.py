"""Replacing several files of a folder: a journal names them once all new ones are on the disk.

Whoever comes after a kill renames what is left, or, where there is no journal yet, removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from . import strict_json
from .descriptors import open_regular, read_all, write_all
from .durable import Replacement, replacing, sweep, sync_folder
from .errors import HeaderError, MissingFileError, NotRegularFileError

try:
    import fcntl
except ImportError:  # Windows: two writers at once are then the caller's to avoid
    fcntl = None  # type: ignore[assignment]

JOURNAL = ".taps-patch.journal"
ENDING = ".shard"  # of temporary files that a journal may name, which `durable.sweep` leaves alone


@contextmanager
def locked(folder: str, *, write: bool) -> Iterator[None]:
    """No other process of this package writes the folder's checkpoint meanwhile, nor reads it if this one writes; waits
    for one that does. What a killed writer left half done is brought to its end first."""
    while True:
        with held(folder, exclusive=write):
            if write:
                recover(folder)
            if write or not unfinished(folder):
                yield
                return
        with held(folder):
            recover(folder)


@contextmanager
def held(folder: str, *, exclusive: bool = True, wait: bool = True) -> Iterator[bool]:
    """The folder locked; False where another process holds it, which `wait` waits for."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(folder, "no such folder") from None
    try:
        yield fcntl is None or _flock(fd, exclusive, wait)
    finally:
        os.close(fd)


def _flock(fd: int, exclusive: bool, wait: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def commit(folder: str, news: Sequence[Replacement]) -> None:
    """Put sealed files in their places. From the moment on that the journal is there, it will be done, by whomever."""
    journal = os.path.join(folder, JOURNAL)
    moves = {os.path.basename(new.temporary): os.path.basename(new.path) for new in news}
    sync_folder(folder)
    with replacing(journal) as fd:
        write_all(fd, memoryview(json.dumps({"renames": moves}).encode()))
    _finish(folder, moves)
    for new in news:
        new.close()


def unfinished(folder: str) -> bool:
    """Whether a `commit` is under way there."""
    return os.path.lexists(os.path.join(folder, JOURNAL))


def recover(folder: str) -> None:
    """Bring what a killed `commit` began to its end, and remove what one left that had not begun."""
    journal = os.path.join(folder, JOURNAL)
    if os.path.lexists(journal):
        with open_regular(journal) as (fd, size):
            raw = bytearray(min(size, 1 << 20))
            read_all(fd, memoryview(raw), path=journal)
        content = strict_json.loads(raw.decode("utf-8", "replace"), path=journal, where="journal")
        moves = content.get("renames") if isinstance(content, dict) else None
        if not isinstance(moves, dict) or not all(
            isinstance(to, str) and os.path.basename(to) == to and os.path.basename(at) == at and at.endswith(ENDING)
            for at, to in moves.items()
        ):
            raise HeaderError(journal, "expected the renames of an unfinished patch; remove it if it is none")
        _finish(folder, moves)
    sweep(folder, ENDING)
    sweep(folder)


def _finish(folder: str, moves: dict[str, str]) -> None:
    for temporary, name in moves.items():
        target = os.path.join(folder, name)
        if os.path.isdir(target):
            raise NotRegularFileError(target, "expected a file to replace, got a folder")
        with suppress(FileNotFoundError):  # it was done before
            os.replace(os.path.join(folder, temporary), target)
    sync_folder(folder)
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, JOURNAL))
    sync_folder(folder)
