"""From a task's file to a state that is ready to be put in: the long part of loading, beside running forwards."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .. import store
from ..files import task as task_file
from ..files.folder import TaskFolder
from ..model import TaskModel
from .facts import Facts
from .tasks import Entry, Install


class Brought(NamedTuple):
    """A task's file as read, the file of the family in the folder or beside it that it names as parent, and where that
    lies if it is not in the folder."""

    file: store.TaskFile
    shared: Path | None = None
    beside: Path | None = None


def read(folder: TaskFolder, path: str | PathLike[str]) -> Brought:
    """Read a file, of which all bytes are proven, and find what it builds on, if that is another file.

    Raises:
        TaskFileError: a damaged file.
    """
    header = store.read_header(Path(path), states=False)
    if header.metadata.kind != "task":
        return Brought(store.TaskFile(kind=header.metadata.kind, parent=header.metadata.parent))
    file = store.load(Path(path), kind="task")
    shared = folder.family(file.parent)
    if shared is not None or Path(path).parent.resolve() == folder.path.resolve():
        return Brought(file, shared)  # in the folder families lie under their digest: no other file needs a look
    beside = task_file.beside(file)
    return Brought(file, beside, beside)


def bring(
    model: TaskModel, found: Brought, facts: Facts, number: int, pack: str | None, entry: Entry | None
) -> Install:
    """Build a task's state, with its family where that is not in the model.

    Args:
        number: makes its name in the model one that no other state ever has.

    Raises:
        TaskFileError: it belongs to another base, or does not fit.
    """
    file, shared = found.file, None
    if found.shared is not None and all(family.digest != file.parent for family in model.families.values()):
        shared = store.load(found.shared, kind="shared")
        store.check_parent(shared.digest, file.parent, path=file.path)
        # Two families of one name may be served at a time, when tasks and what they share were trained anew.
        shared = dataclasses.replace(shared, name=f"{shared.name}@{number}")
    state = model.prepare_task(file, shared=shared, codec=pack)
    family = state.family
    return Install(
        state,
        facts,
        f"{_plain(facts.task or '')}@{number}",
        bytes_of(state),
        None if family is None else family.name,
        0 if family is None else bytes_of(family),
        entry,
    )


def _plain(name: str) -> str:
    """A task's name as a part of one in the model, which is told in errors."""
    return "".join(c if c.isprintable() and c != "/" else "_" for c in name)[:200]


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
