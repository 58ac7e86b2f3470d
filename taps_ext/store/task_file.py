"""A task as the model layer sees it: a record for each part, to and from one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..version import __version__
from . import io
from .errors import MetadataError, Path, show
from .metadata import INCOMPLETE, Metadata
from .record import OnDisk, Record
from .table import PartEntry


def current_versions() -> dict[str, str]:
    """Versions of this package and of torch, as stamped into files."""
    return {"taps_ext": __version__, "torch": str(torch.__version__)}


@dataclass(kw_only=True, eq=False)
class TaskFile:
    """The content of a `.taps` file.

    kind        "task", "shared" for weights that several tasks build on, or "state": where a training run stands
    method      the method's configuration (JSON object), its own name under "method"; {} for a state
    parent      "sha256:<hex>": `fingerprint` of the base, or `digest` of the shared file
    name        the task's name, "" for none
    parts       a record for each part, by the name of its base module ("" is the base itself); `save` takes their facts
                and tensors, `load` also fills in module and path
    values      a state's tensors by name; a state has no parts, and the other kinds have no values
    labels      class names; metrics: JSON object; versions: of the writer; extra: text outside `taps.`
    path, digest    where it was read, and the file's identity; empty for a file not read, ignored by `save`
    complete    whether `parts` are all parts: False for files of 1.0, which do not mention those without tensors
    """

    parent: str
    method: dict[str, Any] = field(default_factory=dict)
    kind: str = "task"
    name: str = ""
    parts: dict[str, Record] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    labels: list[str] | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=current_versions)
    extra: dict[str, str] = field(default_factory=dict)
    path: str = ""
    digest: str = ""
    complete: bool = True

    def metadata(self, *, path: Path) -> Metadata:
        """The file's entries. Raises MetadataError where the parts are not all parts, or no records."""
        if not self.complete:
            raise MetadataError(path, INCOMPLETE)
        for module, record in self.parts.items():
            if not isinstance(record, Record):
                raise MetadataError(path, f"part {show(module)}: expected a Record, got a {type(record).__name__}")
        return Metadata(
            kind=self.kind,
            method=self.method,
            parent=self.parent,
            parts={m: PartEntry(r.facts, tuple(sorted(r.tensors))) for m, r in self.parts.items()},
            values=tuple(sorted(self.values)),
            labels=self.labels,
            metrics=self.metrics,
            versions=self.versions,
            name=self.name,
            extra=self.extra,
        )


def save(path: Path, task: TaskFile) -> int:
    """Writes `task` to `path`, atomically and durably, and returns the size in bytes. Same task, same bytes.

    Raises MetadataError (facts without a kind, a task read from a file of 1.0), GateRecordError (gate and score
    contradict each other), and as `io.write` does.
    """
    metadata = task.metadata(path=path)
    metadata.validate(path=path)
    tensors = {
        stored: task.values[claim.tensor] if task.kind == "state" else task.parts[claim.module].source(claim.tensor)
        for stored, claim in metadata.claims().items()
    }
    return io.write(path, tensors, metadata)


def load(path: Path, *, device: torch.device | str = "cpu", verify: bool = True, kind: str | None = None) -> TaskFile:
    """Reads a task file; of 1.0 and 1.1 too, into the same records.

    Raises KindError if the file is not of `kind` (where given; 0.1's states are states), and as `io.read` does.
    """
    stored = io.read(path, verify=verify, device=device, kind=kind)
    return _task_file(stored.header, stored.tensors.__getitem__, path)


@contextmanager
def opened(path: Path, *, kind: str | None = None) -> Iterator[TaskFile]:
    """A task file whose parts' tensors are read, and proven, where they are asked for, while it is open: what does not
    fit a model is refused by its header. Raises as :func:`load` does.
    """
    with io.opened(path, kind=kind) as (header, fetch):
        yield _task_file(header, fetch, path, lazy=True)


def _task_file(header: io.FileHeader, fetch: Callable[[str], Tensor], path: Path, *, lazy: bool = False) -> TaskFile:
    metadata = header.metadata
    stored: dict[str, dict[str, str]] = {module: {} for module in metadata.parts}
    values: dict[str, Tensor] = {}
    for key, claim in header.claims.items():
        if metadata.kind == "state":
            values[claim.tensor] = fetch(key)
        else:
            stored[claim.module][claim.tensor] = key

    def tensors(module: str) -> Mapping[str, Tensor]:
        keys = stored[module]
        if not lazy:
            return {name: fetch(key) for name, key in keys.items()}
        return OnDisk({name: header.tensors[key] for name, key in keys.items()}, lambda name: fetch(keys[name]))

    return TaskFile(
        kind=metadata.kind,
        method=metadata.method,
        parent=metadata.parent,
        name=metadata.name,
        parts={m: Record(e.facts, tensors(m), module=m, path=path) for m, e in metadata.parts.items()},
        values=values,
        labels=metadata.labels,
        metrics=metadata.metrics,
        versions=metadata.versions,
        extra=dict(metadata.extra),
        path=header.path,
        digest=header.digest,
        complete=metadata.complete,
    )
