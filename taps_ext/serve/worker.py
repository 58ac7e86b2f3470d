"""The one thread that touches the model while an engine is open: it runs batches, and between them puts states of tasks
in and takes others out."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

from . import batch as batches
from .core import Answer, Core
from .errors import TaskReplacedError
from .queue import Request
from .tasks import Entry, Install, Loaded

_CLOSING = 0.05  # seconds between looks at who is still loading, while the engine closes


class Worker(Core):
    """An engine's worker."""

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
