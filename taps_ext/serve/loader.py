"""Tasks come, are replaced and go while the engine serves: what its loader thread does, and who calls `add`."""

from __future__ import annotations

import threading
from os import PathLike

from ..errors import ConfigError, TapsError
from ..files.folder import NameTakenError
from .building import Brought, bring, read
from .errors import EngineClosedError, UnknownTaskError
from .facts import facts_of
from .tasks import Entry, Loaded, stamp_of
from .worker import Worker


class Loader(Worker):
    """An engine's loader."""

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

    def add(self, file: str | PathLike[str], name: str | None = None, *, replace: bool = False) -> str:
        """Put a task's file into the folder and serve it; returns its name ("" of a family's file).

        The task is loaded before anything changes, and then the folder's file and the state that answers are swapped:
        each request is answered by the old state or by the new one, those made after this returned by the new one.

        Raises:
            As :meth:`TaskFolder.add`, and what is wrong with the task on this base; then everything is as it was.
        """
        self._check_thread()
        self._check_open()  # the worker may be at its last batch
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
        self._check_thread()
        self._check_open()  # the worker may be at its last batch
        with self._loading:
            self._check_open()
            if name not in self.folder:
                raise self._unknown(name)
            with self._locked():
                entry = self._tasks.entries.get(name)
            loaded = self._brought(read(self.folder, self.folder.file(name)), name, entry)
            with self._locked():
                self._swap(self._tasks.entries.setdefault(name, Entry(name)), loaded)

    def _check_thread(self) -> None:
        """Raise where the worker itself would wait for the worker: in a callback of a future."""
        if threading.current_thread() is self._threads[0]:
            raise TapsError("called in a future's callback, which must not wait: use submit, or another thread")

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

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine is closed")
