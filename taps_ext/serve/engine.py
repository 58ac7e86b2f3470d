"""Engine: a thousand tasks on disk, some in memory, one batch for many.

One worker thread alone touches the model while the engine is open: it forms batches, runs them, and between them puts
states of tasks in and takes others out, so that no forward ever sees a task come or go. One loader thread reads and
builds what is asked for; `add` and `reload` do so in the thread that calls them. All else is behind one lock.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, suggestion
from ..files.folder import NameTakenError, TaskFolder
from ..model import TaskModel
from ..parts.packing import Rule
from . import batch as batches
from .counters import Counters, to_text
from .errors import EngineClosedError, InputError, QueueFullError, TaskReplacedError, UnknownTaskError, own
from .facts import Facts, facts_of
from .loading import Brought, bring, read
from .queue import Queue, Request
from .tasks import Entry, Install, Loaded, Residents, stamp_of

_CLOSING = 0.05  # seconds between looks at who is still loading, while the engine closes


@dataclass(frozen=True, eq=False)
class Answer:
    """An output, and what the state that gave it says of itself."""

    output: Any
    facts: Facts


class Engine:
    """Answers requests for any task of a folder, in batches across tasks.

        with Engine(model, "tasks", max_resident_bytes=2_000_000_000, pin=["birds"]) as engine:
            logits = engine.predict(image, "birds")

    A task is loaded from its file when it is first asked for, and the one that was used least recently goes when the
    limit is passed. Its Deltas are held as the file has them: packed ones stay packed.

    Args:
        model: in evaluation mode. The engine's tasks come and go under names of its own beside those that the model
            has; nobody else adds or deletes tasks, trains, or moves the model while the engine is open.
        folder: the tasks' files.
        max_resident_bytes: of all tasks' tensors in memory; None: no limit. One more task is in memory while it is
            built.
        pin: tasks that are loaded now and stay.
        max_batch: samples of a forward. max_delay: seconds that a request waits at most for others to join its batch.
        max_queue: samples that wait at most, for a batch or for their task's file.
        pack: a codec as `pack_task` takes it, for tasks whose files are not packed.
        sample: one input as every task takes it: then its shape and type are what inputs must have. Without it they are
            as a task's file keeps them (`preprocessing`); where that says nothing, inputs are batches of any shape.

    Raises:
        ConfigError: arguments that make no sense; a pinned task that is not there. TaskFileError: of a pinned task.
    """

    def __init__(
        self,
        model: TaskModel,
        folder: TaskFolder | str | PathLike[str],
        *,
        max_resident_bytes: int | None = None,
        pin: Iterable[str] = (),
        max_batch: int = 64,
        max_delay: float = 0.005,
        max_queue: int = 1024,
        pack: str | None = None,
        sample: Tensor | None = None,
    ) -> None:
        if not isinstance(model, TaskModel):
            raise ConfigError(f"model: expected a TaskModel, got {type(model).__name__}")
        if any(module.training for module in (model, model.base)):
            raise ConfigError("model: expected one in evaluation mode, got training mode; call eval() first")
        _check_limit("max_resident_bytes", max_resident_bytes, none=True)
        _check_limit("max_batch", max_batch)
        _check_limit("max_queue", max_queue)
        if isinstance(max_delay, bool) or not isinstance(max_delay, (int, float)) or not 0 <= max_delay < 60:
            raise ConfigError(f"max_delay: expected seconds from 0 to 60, got {max_delay!r}")
        if isinstance(pin, str):
            raise ConfigError(f"pin: expected a list of tasks, got {pin!r}")
        if sample is not None and not isinstance(sample, Tensor):
            raise ConfigError(f"sample: expected a tensor, got {type(sample).__name__}")
        if pack is not None:
            Rule.of(pack, None, None)
        self.model = model
        self.folder = folder if isinstance(folder, TaskFolder) else TaskFolder(folder)
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
        self._loads: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"taps-serve-{name}", daemon=True)
            for name, work in (("worker", self._work), ("loader", self._load_all))
        ]
        for thread in self._threads:
            thread.start()
        try:
            for name in pin:
                self._pin(name)
        except BaseException:
            self.close()
            raise

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

    # -- requests

    def submit(self, input: Tensor, task: str | None) -> Future[Any]:
        """Ask for what a task makes of an input; the future gives the output, on the input's device.

        What is wrong with the request is the future's error: UnknownTaskError, InputError, a TaskFileError for a
        damaged or foreign file, or what the forward raised.

        Args:
            input: one sample, or a batch of some `[N, ...]`; nobody writes to it until it is answered.
            task: a name in the folder; None is the base.

        Raises:
            QueueFullError: `max_queue` samples wait. EngineClosedError: after :meth:`close`.
        """
        return self._submit(input, task).future

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

    def predict(self, input: Tensor, task: str | None) -> Any:
        """The same, once it is there. Raises what is wrong with the request."""
        return self.submit(input, task).result()

    async def predict_async(self, input: Tensor, task: str | None) -> Any:
        """The same without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(input, task))

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

    # -- the worker

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException as error:
            self._break(error)
            raise
        finally:
            with self._locked():
                left = list(self._tasks.held)
                for entry in self._tasks.entries.values():
                    entry.loaded = None
            self._drop(left)

    def _next(self) -> Callable[[], None] | None:
        """What to do now, waited for; None: everything is answered, and nothing will come."""
        with self._locked():
            while True:
                if self._drops:
                    going, self._drops = self._drops, []
                    return functools.partial(self._drop, going)
                if self._install is not None and (job := self._room(self._install)) is not None:
                    return job
                now = time.monotonic()
                taken = self._queue.take(now, flush=self._closing or self._install is not None)
                if taken:
                    return self._formed(taken)
                if self._closing and not self._samples and not self._loading.locked():
                    return None
                deadline = self._queue.deadline()
                wait = None if deadline is None else max(deadline - now, 0)
                self._wake.wait(_CLOSING if self._closing and wait is None else wait)

    def _formed(self, taken: list[Request]) -> Callable[[], None]:
        """A batch: which state answers a request is decided here."""
        chosen: list[tuple[Request, Loaded]] = []
        for request in taken:
            entry, loaded = request.entry, request.entry.loaded
            entry.ready -= 1
            assert loaded is not None
            if not request.future.set_running_or_notify_cancel():
                self._counters.cancelled += 1
                self._samples -= request.samples
            elif request.digest not in (None, loaded.facts.digest):
                self._fail([request], TaskReplacedError(f"task {entry.name!r}: was replaced meanwhile"))
            else:
                chosen.append((request, loaded))
            if entry.gone and not entry.ready:
                self._forget(entry)
        self._running = [request for request, _ in chosen]
        return functools.partial(self._run, chosen)

    def _run(self, chosen: list[tuple[Request, Loaded]]) -> None:
        if not chosen:
            return
        inputs = [request.batch for request, _ in chosen if request.batch is not None]
        names = [loaded.name for _, loaded in chosen]
        try:
            outputs = batches.run(self.model, inputs, names, self._device, self.max_batch)
        except Exception as error:
            if len(chosen) == 1:
                with self._locked():
                    self._fail([chosen[0][0]], error)
            else:  # one's error is not another's
                for one in chosen:
                    self._run([one])
            return
        now = time.monotonic()
        with self._locked():
            self._counters.batches += 1
            for request, _ in chosen:
                self._counters.samples += request.samples
                self._samples -= request.samples
                self._counters.answered(now - request.arrived)
        for (request, loaded), output in zip(chosen, outputs, strict=True):
            given = batches.first(output) if request.one else output
            request.future.set_result(Answer(given, loaded.facts) if request.whole else given)

    def _room(self, job: Install) -> Callable[[], None] | None:
        """The work of putting a state in, once those that must go for it are idle."""
        try:
            going = self._tasks.make_room(job)
        except Exception as error:
            self._install = None
            self._stop_draining()
            job.done.set_exception(error)
            return lambda: None
        if going is None:
            return None
        self._install = None
        dropped = [self._take(entry) for entry in going]
        self._counters.evictions += len(dropped)
        self._stop_draining()
        return functools.partial(self._put, job, dropped)

    def _take(self, entry: Entry) -> Loaded:
        """A state out of an entry, whose waiting requests have it loaded again."""
        loaded, entry.loaded, entry.draining = entry.loaded, None, False
        assert loaded is not None and not entry.ready
        if entry.waiting:
            self._ask(entry)
        return loaded

    def _stop_draining(self) -> None:
        for entry in self._tasks.entries.values():
            if entry.draining:
                entry.draining = False
                self._flush(entry)

    def _flush(self, entry: Entry) -> None:
        """Requests that waited for a task may go on."""
        waiting, entry.waiting = entry.waiting, type(entry.waiting)()
        for request in waiting:
            self._admit(request)

    def _put(self, job: Install, dropped: list[Loaded]) -> None:
        try:
            self._drop(dropped)
            self.model.install_task(job.state, job.name)
        except BaseException as error:
            job.done.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        loaded = Loaded(job.name, job.facts, job.nbytes, job.family)
        with self._locked():
            self._tasks.held.add(loaded)
            if job.family is not None:
                self._tasks.families[job.family] = job.family_bytes
            self._counters.loads += 1
        job.done.set_result(loaded)

    def _drop(self, going: Iterable[Loaded]) -> None:
        """Take states out of the model, and families that were theirs alone."""
        for loaded in going:
            assert loaded.name is not None
            self.model.delete_task(loaded.name)
            with self._locked():
                self._tasks.held.discard(loaded)
                last = loaded.family is not None and all(o.family != loaded.family for o in self._tasks.held)
                if last:
                    del self._tasks.families[loaded.family or ""]
            if last:
                assert loaded.family is not None
                self.model.delete_family(loaded.family)

    def _forget(self, entry: Entry) -> None:
        """A removed task whose last request is in a batch that runs before anything is dropped."""
        if entry.loaded is not None:
            self._drops.append(entry.loaded)
            entry.loaded = None
            self._wake.notify_all()

    def _break(self, error: BaseException) -> None:
        """A mistake of ours: nobody is left to wait."""
        with self._locked():
            self._closing = self._broken = True
            left = [*self._queue.clear(), *(r for r in self._running if not r.future.done())]
            for entry in self._tasks.entries.values():
                left += entry.waiting
                entry.waiting.clear()
            self._fail(left, error)
            job, self._install = self._install, None
        if job is not None:
            job.done.set_exception(error)
        self._loads.put(None)

    # -- loading

    def _load_all(self) -> None:
        while (entry := self._loads.get()) is not None:
            with self._loading:
                self._load(entry)
            with self._locked():
                self._wake.notify_all()  # a worker that closes waits for this

    def _load(self, entry: Entry) -> None:
        """Bring the task that an entry names into memory, and its requests on their way."""
        with self._locked():
            if entry.loaded is not None or entry.gone:
                entry.loading = False
                if entry.gone:
                    self._refuse_gone(entry)
                else:
                    self._flush(entry)
                return
        name, stamp = entry.name or "", None
        try:
            path = self.folder.file(name)
            stamp = stamp_of(path)
            loaded = self._brought(read(self.folder, path), name, entry)
        except Exception as error:
            with self._locked():
                entry.loading, entry.error, entry.stamp = False, error, stamp
                self._flush(entry)
            return
        with self._locked():
            entry.loading = False
            if entry.gone:
                self._drops.append(loaded)
                self._refuse_gone(entry)
            else:
                self._swap(entry, loaded)

    def _refuse_gone(self, entry: Entry) -> None:
        waiting, entry.waiting = entry.waiting, type(entry.waiting)()
        self._fail(waiting, UnknownTaskError(f"task: {entry.name!r} was removed from {self.folder.path}"))
        self._wake.notify_all()

    def _swap(self, entry: Entry, loaded: Loaded) -> None:
        """From now on batches are formed with this state."""
        if entry.loaded is not None:
            self._drops.append(entry.loaded)
        entry.loaded, entry.error, entry.stamp, entry.gone = loaded, None, None, False
        self._tasks.use(entry)
        self._flush(entry)
        self._wake.notify_all()

    def _brought(self, found: Brought, name: str, entry: Entry | None) -> Loaded:
        """A file's task in the model; the loading lock is held."""
        facts = facts_of(name, found.file, found.file.digest, self._sample, self._dtype)
        job = bring(self.model, found, facts, next(self._numbers), self.pack, entry)
        with self._locked():
            if self._broken:
                raise EngineClosedError("the engine has failed")
            self._install = job
            self._wake.notify_all()
        return job.done.result()

    def _pin(self, name: str) -> None:
        with self._loading:
            path = self.folder.file(name)
            loaded = self._brought(read(self.folder, path), name, None)
            with self._locked():
                entry = self._tasks.entries.setdefault(name, Entry(name))
                entry.pinned = True
                self._swap(entry, loaded)

    # -- the folder while serving

    def add(self, file: str | PathLike[str], name: str | None = None, *, replace: bool = False) -> str:
        """Put a task's file into the folder and serve it; returns its name ("" of a family's file).

        The task is loaded before anything changes, and then the folder's file and the state that answers are swapped:
        each request is answered by the old state or by the new one, those made after this returned by the new one.

        Raises:
            As :meth:`TaskFolder.add`, and what is wrong with the task on this base; then everything is as it was.
        """
        with self._loading:
            self._check_open()
            found = read(self.folder, file)
            if found.file.kind != "task":
                return self.folder.add(file, name, replace=replace)
            name = found.file.name if name is None else name
            if not replace and name in self.folder:
                raise NameTakenError(f"name: {name!r} is in {self.folder.path} already")
            with self._locked():
                entry = self._tasks.entries.get(name)
            loaded = self._brought(found, name, entry)
            try:
                if found.beside is not None:
                    self.folder.add(found.beside)
                self.folder.add(file, name, replace=replace)
                if self.folder.header(name).digest != loaded.facts.digest:
                    raise ConfigError(f"file: {file} was written to while it was added; add it again")
            except BaseException:
                with self._locked():
                    self._drops.append(loaded)
                    self._wake.notify_all()
                raise
            with self._locked():
                self._swap(self._tasks.entries.setdefault(name, Entry(name)), loaded)
        return name

    def reload(self, name: str) -> None:
        """Serve what a task's file holds now. Files that others write are looked at when their task is not in memory,
        and here.

        Raises:
            ConfigError: no such task. TaskFileError: what is wrong with the file; a state that is in memory stays.
        """
        with self._loading:
            self._check_open()
            if name not in self.folder:
                raise self._unknown(name)
            with self._locked():
                entry = self._tasks.entries.get(name)
            loaded = self._brought(read(self.folder, self.folder.file(name)), name, entry)
            with self._locked():
                self._swap(self._tasks.entries.setdefault(name, Entry(name)), loaded)

    def remove(self, name: str) -> None:
        """Delete a task's file. Requests that are in the queue are answered, later ones are for an unknown task.

        Raises:
            ConfigError: no such task.
        """
        with self._loading:
            if name not in self.folder:
                raise self._unknown(name)
            self.folder.remove(name)
            with self._locked():
                entry = self._tasks.entries.pop(name, None)
                if entry is not None:
                    entry.gone = True
                    if not entry.loading:
                        self._refuse_gone(entry)
                    if not entry.ready:
                        self._forget(entry)

    # -- what there is

    def facts(self, task: str) -> Facts:
        """What the state that answers for a task says of itself; of one that is not in memory, its file.

        Raises:
            UnknownTaskError: no such task. TaskFileError: its file cannot be read.
        """
        with self._locked():
            entry = self._find(task)
            if entry is not None and entry.loaded is not None:
                return entry.loaded.facts
            if entry is not None and entry.error is not None:
                raise own(entry.error)
        if entry is None:
            raise self._unknown(task)
        header = self.folder.header(task)
        return facts_of(task, header.metadata, header.digest, self._sample, self._dtype)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what there is now; JSON-ready."""
        with self._locked():
            return {
                **self._counters.to_dict(),
                "resident_tasks": len(self._tasks.held),
                "resident_bytes": self._tasks.nbytes,
                "queued_samples": self._samples,
            }

    def metrics_text(self) -> str:
        """The same in Prometheus' text format."""
        return to_text(self.stats())

    @property
    def resident(self) -> list[str]:
        """Names of the tasks in memory, the one that would go first first."""
        with self._locked():
            found = sorted(self._tasks.resident(), key=lambda entry: entry.used)
            return [entry.name for entry in found if entry.name is not None]

    @property
    def alive(self) -> bool:
        """False once a thread of the engine's has ended."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self.alive and not self._closing

    # -- the end

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine is closed")

    def close(self) -> None:
        """Answer what waits, refuse what comes, and take the engine's tasks out of the model."""
        with self._locked():
            self._closing = True
            self._wake.notify_all()
        worker, loader = self._threads
        worker.join()
        self._loads.put(None)
        loader.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_limit(name: str, value: object, *, none: bool = False) -> None:
    if not (none and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name}: expected an int >= 1{' or None' if none else ''}, got {value!r}")


def _shape(sample: Tensor | None) -> tuple[int, ...] | None:
    return None if sample is None else tuple(sample.shape)


def _type(sample: Tensor | None) -> torch.dtype | None:
    return None if sample is None else sample.dtype
