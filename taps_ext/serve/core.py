"""What the threads of an engine share: the entries, the queue, the counters, one lock around them, and the road of a
request to where it waits."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import suggestion
from ..files.folder import TaskFolder
from ..model import TaskModel
from .counters import Counters
from .errors import EngineClosedError, InputError, QueueFullError, UnknownTaskError, own
from .facts import Facts
from .queue import Queue, Request
from .tasks import Entry, Install, Loaded, Residents, stamp_of


@dataclass(frozen=True, eq=False)
class Answer:
    """An output, and what the state that gave it says of itself."""

    output: Any
    facts: Facts


class Core:
    """See :class:`.engine.Engine`, whose arguments these are, checked."""

    def __init__(
        self,
        model: TaskModel,
        folder: TaskFolder,
        *,
        max_resident_bytes: int | None,
        max_batch: int,
        max_delay: float,
        max_queue: int,
        pack: str | None,
        sample: Tensor | None,
    ) -> None:
        self.model = model
        self.folder = folder
        self.max_batch, self.max_delay, self.max_queue, self.pack = max_batch, max_delay, max_queue, pack
        self._sample = sample
        found = next((p for p in model.base.parameters() if p.is_floating_point()), None)
        self._device = torch.device("cpu") if found is None else found.device
        self._dtype = torch.get_default_dtype() if found is None else found.dtype
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._tasks = Residents(max_resident_bytes)
        self._base = Entry(None, Loaded(None, Facts(None, shape=_shape(sample), dtype=_type(sample))), pinned=True)
        self._queue = Queue(max_batch, float(max_delay))
        self._counters = Counters()
        self._samples = 0  # that wait
        self._drops: list[Loaded] = []
        self._failed: list[tuple[Request, BaseException]] = []  # to be told once the lock is free
        self._running: list[Request] = []
        self._install: Install | None = None
        self._numbers = itertools.count(1)
        self._closing = self._broken = False
        self._loading = threading.Lock()  # held from the reading of a file until its state is in the model
        self._threads: list[threading.Thread] = []  # the worker and the loader
        self._loads: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock. Errors are told after it, since who hears of one may well ask for the next."""
        failed: list[tuple[Request, BaseException]] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    failed, self._failed = self._failed, []
        finally:
            for request, error in failed:
                request.future.set_exception(own(error))

    def _submit(self, input: Tensor, task: str | None, *, digest: str | None = None, whole: bool = False) -> Request:
        request = Request(input, self._base, time.monotonic(), digest, whole)
        with self._locked():
            self._counters.requests += 1
            if self._closing:
                self._counters.refused += 1
                raise EngineClosedError("the engine is closed" if not self._broken else "the engine has failed")
            if self._samples >= self.max_queue:
                self._counters.refused += 1
                raise QueueFullError(
                    f"queue: {self._samples} samples wait, of at most {self.max_queue}; try again later"
                )
            entry = self._base if task is None else self._find(task)
            if entry is not None:
                request.entry = entry
                self._samples += request.samples
                self._admit(request)
                return request
        error = self._unknown(task)
        with self._locked():
            self._samples += request.samples
            self._fail([request], error)
        return request

    def _unknown(self, task: object) -> UnknownTaskError:
        hint = suggestion(str(task), self.folder)
        return UnknownTaskError(f"task: no task {task!r} in {self.folder.path}{hint}")

    def _find(self, task: str) -> Entry | None:
        """The entry of a task, with its file being loaded where that is to be; None: no such task."""
        entry = self._tasks.entries.get(task) if isinstance(task, str) else None
        if entry is None or (entry.loaded is None and not entry.loading):
            if task not in self.folder:
                self._tasks.entries.pop(task, None)
                return None
            entry = self._tasks.entries.setdefault(task, Entry(task))
            if entry.error is not None and stamp_of(self.folder.file(task)) != entry.stamp:
                entry.error = None
        self._tasks.use(entry)
        return entry

    def _admit(self, request: Request) -> None:
        """Put a request where it belongs: in the queue, to those that wait for their task, or to those that failed."""
        entry = request.entry
        if entry.loaded is not None and not entry.draining:
            before = request.samples
            try:
                request.batch, request.one = entry.loaded.facts.batched(request.input)
            except InputError as error:
                self._fail([request], error)
                return
            self._samples += request.samples - before
            entry.ready += 1
            self._queue.put(request)
            self._wake.notify_all()
        elif entry.error is not None:
            self._fail([request], entry.error)
        else:
            entry.waiting.append(request)
            if entry.loaded is None:
                self._ask(entry)

    def _ask(self, entry: Entry) -> None:
        if not entry.loading:
            entry.loading = True
            self._loads.put(entry)

    def _fail(self, requests: Iterable[Request], error: BaseException) -> None:
        """Answer with an error, once the lock is free."""
        for request in requests:
            self._samples -= request.samples
            if request.future.running() or request.future.set_running_or_notify_cancel():
                self._counters.errors[type(error).__name__] += 1
                self._failed.append((request, error))
            else:
                self._counters.cancelled += 1

    def _flush(self, entry: Entry) -> None:
        """Requests that waited for a task may go on."""
        waiting, entry.waiting = entry.waiting, type(entry.waiting)()
        for request in waiting:
            self._admit(request)


def _shape(sample: Tensor | None) -> tuple[int, ...] | None:
    return None if sample is None else tuple(sample.shape)


def _type(sample: Tensor | None) -> torch.dtype | None:
    return None if sample is None else sample.dtype
