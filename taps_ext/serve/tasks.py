"""Which tasks are in memory: what each takes, which one goes when another needs the room, and who waits for whom.

Nothing here locks or touches a model: the engine does, and holds its lock around every call.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import TaskTooLargeError
from .facts import Facts
from .queue import Request

if TYPE_CHECKING:
    from ..model.state import TaskState

Stamp = tuple[int, int, int]
"""What tells that a file is another: when it was written, its bytes, and its place on the disk."""


def stamp_of(path: str | os.PathLike[str]) -> Stamp | None:
    """None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass(frozen=True, eq=False)
class Loaded:
    """One state of a task in memory.

    Attributes:
        name: the model's own for it, which no other state ever has; None is the base.
        nbytes: of its tensors. family: the model's name for the family below, or None.
    """

    name: str | None
    facts: Facts
    nbytes: int = 0
    family: str | None = None


@dataclass(eq=False)
class Entry:
    """A task of the folder that was asked for.

    Attributes:
        loaded: its state, or None. It is swapped whole, between batches.
        loading: its file is being read, or is about to be.
        error, stamp: why it cannot be answered, and of which file that is so.
        waiting: requests until it is loaded. ready: how many are in the queue.
        draining: it goes once those in the queue are answered.
        gone: removed from the folder.
        used: a number that grows with each request.
    """

    name: str | None
    loaded: Loaded | None = None
    loading: bool = False
    pinned: bool = False
    error: Exception | None = None
    stamp: Stamp | None = None
    waiting: deque[Request] = field(default_factory=deque)
    ready: int = 0
    draining: bool = False
    gone: bool = False
    used: int = 0


@dataclass(eq=False)
class Install:
    """A state that waits for its room. `entry`: whose state it replaces, or None; the future's result is the Loaded."""

    state: TaskState
    facts: Facts
    name: str
    nbytes: int
    family: str | None
    family_bytes: int
    entry: Entry | None
    done: Future[Loaded] = field(default_factory=Future)


class Residents:
    """The entries by name, and the bytes of all states that are in memory.

    Args:
        limit: bytes, or None.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.entries: dict[str, Entry] = {}
        self.held: set[Loaded] = set()  # in the model, dropped ones that are still there included
        self.families: dict[str, int] = {}  # bytes by the model's name
        self._clock = itertools.count(1)

    @property
    def nbytes(self) -> int:
        return sum(loaded.nbytes for loaded in self.held) + sum(self.families.values())

    def use(self, entry: Entry) -> None:
        entry.used = next(self._clock)

    def resident(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.loaded is not None]

    def _freed(self, entries: Iterable[Entry]) -> int:
        """The bytes that would go with these entries' states, and with families that nobody else builds on."""
        going = {entry.loaded for entry in entries if entry.loaded is not None}
        left = {loaded.family for loaded in self.held - going}
        families = {loaded.family for loaded in going if loaded.family not in left}
        return sum(l.nbytes for l in going) + sum(self.families.get(name or "", 0) for name in families)

    def make_room(self, job: Install) -> list[Entry] | None:
        """The entries whose states are to go before a new one comes; None while some of those are in the queue, which
        take no more requests from now on.

        Raises:
            TaskTooLargeError: the new state does not fit beside what is pinned.
        """
        if self.limit is None:
            return []
        family = 0 if job.family in self.families else job.family_bytes
        over = self.nbytes + job.nbytes + family - self.limit
        going: list[Entry] = []
        able = [entry for entry in self.resident() if not entry.pinned or entry is job.entry]
        # Idle ones first; whoever is draining is meant to go, and its own old state is the last resort.
        able.sort(key=lambda entry: (entry is job.entry, entry.ready > 0 and not entry.draining, entry.used))
        for entry in able:
            if self._freed(going) >= over:
                break
            going.append(entry)
        if self._freed(going) < over and self.held - {entry.loaded for entry in self.resident()}:
            return None  # removed or replaced ones are on their way out
        if self._freed(going) < over:
            raise TaskTooLargeError(
                f"task {job.facts.task!r}: takes {job.nbytes + family} bytes, for which max_resident_bytes = "
                f"{self.limit} has no room beside the pinned tasks ({self.nbytes - self._freed(able)} bytes)"
            )
        if any(entry.ready for entry in going):
            for entry in going:
                entry.draining = entry.ready > 0
            return None
        return going
