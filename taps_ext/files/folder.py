"""TaskFolder: files of many tasks in one folder, each under its task's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from .. import store
from ..errors import ConfigError, TaskFileError, suggestion
from ..store.names import SHARED, file_name, name_of, shared_file_name

_ENDING = ".taps"


class NameTakenError(ConfigError):
    """A folder has a task of that name already: `problem`, and the `remedy` in the words of who asked."""

    def __init__(self, problem: str, remedy: str = "replace=True replaces it") -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem, self.remedy)


class TaskFolder:
    """A folder of tasks' files. Nothing is read where it is opened, and a task is found by its file's name, so that a
    thousand tasks cost what ten do.

        folder = TaskFolder("tasks", create=True)
        folder.add("runs/birds/birds.taps")
        model.load_task(folder.file("birds"), shared=folder.shared("birds"))

    Names that differ in case alone are one file where the file system does not tell upper from lower case (APFS and
    NTFS as they come): the second is refused as taken. A name that is too long for a file's is cut there and told by
    its digest; it is listed by what the file itself says, or as the file is called where that is damaged.

    Several programs may write at a time: files appear whole, and of two that add the same name one is refused. Files of
    families (what tasks share) lie there too, by their digest.

    Args:
        path: the folder. create: make it where there is none.

    Raises:
        ConfigError: no such folder.
    """

    def __init__(self, path: str | PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path)
        if create:
            with suppress(FileExistsError):  # a file: said below
                self.path.mkdir(parents=True, exist_ok=True)
        if not self.path.is_dir():
            raise ConfigError(f"path: expected a folder, got {self.path}{'' if create else '; create=True makes it'}")

    def file(self, name: str) -> Path:
        """Where a task's file is.

        Raises:
            ConfigError: no such task, with a suggestion.
        """
        path = self._place(name)
        if not path.is_file():
            raise ConfigError(f"name: no task {name!r} in {self.path}{suggestion(name, self)}")
        return path

    def _place(self, name: str) -> Path:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"name: expected a task's name, got {name!r}")
        return self.path / file_name(name, _ENDING)

    def _shared(self, digest: str) -> Path:
        return self.path / f"{shared_file_name(digest)}{_ENDING}"

    def shared(self, name: str) -> Path | None:
        """The file of the family that a task builds on, if it is in the folder."""
        return self.family(self.header(name).metadata.parent)

    def family(self, digest: str) -> Path | None:
        """The file of the family of this digest, if it is in the folder."""
        path = self._shared(digest)
        return path if path.is_file() else None

    def header(self, name: str) -> store.FileHeader:
        """What a task's file says, without its tensors. Raises as :meth:`file`, and TaskFileError."""
        return store.read_header(self.file(name), kind="task")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(name) and self._place(name).is_file()

    def __iter__(self) -> Iterator[str]:
        """The tasks' names, sorted."""
        entries = (entry for entry in os.listdir(self.path) if entry.endswith(_ENDING))
        return iter(sorted(self._name(entry) for entry in entries if not entry.startswith(SHARED)))

    def _name(self, entry: str) -> str:
        """The task's name by its file's, or by what the file says where it was too long for that."""
        name = name_of(entry[: -len(_ENDING)])
        if name is not None:
            return name
        try:
            return store.read_header(self.path / entry, kind="task").metadata.name
        except (TaskFileError, OSError):
            return entry[: -len(_ENDING)]

    def __len__(self) -> int:
        return sum(1 for entry in os.listdir(self.path) if entry.endswith(_ENDING) and not entry.startswith(SHARED))

    def add(self, file: str | PathLike[str], name: str | None = None, *, replace: bool = False) -> str:
        """Copy a task's or family's file into the folder, proven and durable; returns the task's name ("" of a family).

        Args:
            name: what the folder calls the task; None: as its file does. replace: a task of that name that is there.

        Raises:
            TaskFileError: a damaged file, or one of another kind. ConfigError: a name that is missing, or taken
                (`NameTakenError`).
        """
        header = store.read_header(Path(file), states=False)
        kind = header.metadata.kind
        if kind == "shared":
            if name is not None:
                raise ConfigError(f"name: expected None for a family's file, got {name!r}")
            store.copy(file, self._shared(header.digest), replace=True)  # the same content, if it is there
            return ""
        if kind != "task":
            raise ConfigError(f"file: expected a task's or a family's, got a {kind} in {os.fspath(file)}")
        name = header.metadata.name if name is None else name
        target = self._place(name)
        if name_of(target.stem) is None and name != header.metadata.name:  # there it could not be told
            raise ConfigError(f"name: expected one that is shorter, or the file's own, got {name!r}")
        try:
            store.copy(file, target, replace=replace)
        except FileExistsError:
            raise NameTakenError(f"name: {name!r} is in {self.path} already") from None
        return name

    def remove(self, name: str) -> None:
        """Delete a task's file. Raises as :meth:`file`."""
        self.file(name).unlink()
        store.sync_folder(os.fspath(self.path))

    def verify(self) -> dict[str, str | None]:
        """Each file in the folder -> None where all of its bytes are those that were written, else what is wrong."""
        found: dict[str, str | None] = {}
        for entry in sorted(os.listdir(self.path)):
            if entry.endswith(_ENDING):
                found[entry] = store.sound(self.path / entry)[1]
        return found

    def summary(self, name: str) -> dict[str, Any]:
        """JSON-ready facts of a task: method, bytes, labels, parent. Raises as :meth:`header`."""
        header = self.header(name)
        meta = header.metadata
        labels = None if meta.labels is None else len(meta.labels)
        facts = {"method": meta.method.get("method"), "bytes": header.file_bytes, "labels": labels}
        return {"task": name, **facts, "parent": meta.parent, "digest": header.digest}
