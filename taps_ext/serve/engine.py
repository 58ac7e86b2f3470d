"""Engine: a thousand tasks on disk, some in memory, one batch for many.

One worker thread alone touches the model while the engine is open: it forms batches, runs them, and between them puts
states of tasks in and takes others out, so that no forward ever sees a task come or go (`worker.py`). One loader thread
reads and builds what is asked for; `add` and `reload` do so in the thread that calls them (`loader.py`). All else is
behind one lock (`core.py`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files.folder import TaskFolder
from ..model import TaskModel
from ..parts.packing import Rule
from .core import Answer
from .counters import to_text
from .errors import own
from .facts import Facts, facts_of
from .loader import Loader


class Engine(Loader):
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
        if model.batch_dim != 0:
            raise ConfigError(f"model: expected one with batch_dim = 0, got {model.batch_dim}")
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
        super().__init__(
            model,
            folder if isinstance(folder, TaskFolder) else TaskFolder(folder),
            max_resident_bytes=max_resident_bytes,
            max_batch=max_batch,
            max_delay=float(max_delay),
            max_queue=max_queue,
            pack=pack,
            sample=sample,
        )
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

    def request(self, input: Tensor, task: str | None, *, digest: str | None = None) -> Future[Answer]:
        """The same with what the state that answered says of itself.

        Args:
            digest: of the task's file that the input was made for (:meth:`facts`); another one refuses it by
                TaskReplacedError.
        """
        return self._submit(input, task, digest=digest, whole=True).future

    def predict(self, input: Tensor, task: str | None) -> Any:
        """The same, once it is there. Raises what is wrong with the request."""
        self._check_thread()
        return self.submit(input, task).result()

    async def predict_async(self, input: Tensor, task: str | None) -> Any:
        """The same without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(input, task))

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
    def dtype(self) -> torch.dtype:
        """Of the base, and so of images."""
        return self._dtype

    @property
    def alive(self) -> bool:
        """False once a thread of the engine's has ended."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self.alive and not self._closing

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
