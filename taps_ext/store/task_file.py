"""A task as the model layer sees it: gated layers, norms, other values and a head, to and from one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TaskFileError
from ..version import __version__
from . import codecs, io
from .errors import CodecError, GateRecordError, Path, show
from .metadata import LayerEntry, Metadata, check_kind


@dataclass(kw_only=True, eq=False)
class LayerRecord:
    """One gated layer of a task.

    `learn`: the gate is learned and `score` (float32, shape [], finite) is stored; otherwise the gate is
    fixed and there is no score. `open`: the gate's state, and whether a delta is stored. The delta (any shape
    and dtype) is `delta`, stored by `codec`; or `parts`, as that codec has already encoded it.
    """

    learn: bool
    open: bool
    score: Tensor | None = None
    delta: Tensor | None = None
    codec: str = "dense"
    parts: Mapping[str, Tensor] | None = None


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
    layers      gated layers by module name
    norms       norm parameters and running statistics by name in the base, "<module>.<tensor>"
    values      other task parameters and buffers by name in the base
    head        head tensors by name within the head; `head_spec` (JSON object) says how to rebuild it
    labels      class names; metrics: JSON object; versions: of the writer; extra: text outside `taps.`
    path, digest    where it was read, and the file's identity; empty for a file not read, ignored by `save`
    """

    parent: str
    method: dict[str, Any] = field(default_factory=dict)
    kind: str = "task"
    name: str = ""
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    head_spec: dict[str, Any] | None = None
    labels: list[str] | None = None
    metrics: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=current_versions)
    extra: dict[str, str] = field(default_factory=dict)
    path: str = ""
    digest: str = ""

    def metadata(self, *, path: Path) -> Metadata:
        """The file's tables, with every layer record checked. Raises GateRecordError."""
        for name, record in self.layers.items():
            _check_record(name, record, path=path)
        return Metadata(
            kind=self.kind,
            method=self.method,
            parent=self.parent,
            layers={n: LayerEntry(r.learn, r.open, r.codec if r.open else None) for n, r in self.layers.items()},
            values=tuple(sorted(self.values)),
            norms=tuple(sorted(self.norms)),
            head=tuple(sorted(self.head)),
            head_spec=self.head_spec,
            labels=self.labels,
            metrics=self.metrics,
            versions=self.versions,
            name=self.name,
            extra=self.extra,
        )


def save(path: Path, task: TaskFile) -> int:
    """Writes `task` to `path`, atomically and durably, and returns the size in bytes. Same task, same bytes.

    Raises GateRecordError (gate, score and delta contradict each other), CodecError, and as `io.write` does.
    """
    metadata = task.metadata(path=path)
    encoded = {name: _encode(name, record, path=path) for name, record in task.layers.items() if record.open}
    tensors: dict[str, Tensor] = {}
    for stored, claim in metadata.claims(path=path).items():
        if claim.group == "score":
            score = task.layers[claim.name].score
            assert score is not None
            tensors[stored] = score
        elif claim.group == "delta":
            tensors[stored] = encoded[claim.name][claim.part]
        else:
            source = {"value": task.values, "norm": task.norms, "head": task.head}[claim.group]
            tensors[stored] = source[claim.name]
    return io.write(path, tensors, metadata)


def load(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    verify: bool = True,
    decode: bool = True,
    kind: str | None = None,
) -> TaskFile:
    """Reads a task file. With `decode=False` deltas stay as the codec's `parts` (for kernels that read them
    packed).

    Raises KindError if the file is not of `kind` (where given; 0.1's states are states), and as `io.read` and the
    codec's decode do.
    """
    stored = io.read(path, verify=verify, device=device)
    metadata = stored.header.metadata
    check_kind(kind, metadata.kind, path=path)
    layers = {
        name: LayerRecord(
            learn=entry.learn, open=entry.open, codec=entry.codec or "dense", parts={} if entry.open else None
        )
        for name, entry in metadata.layers.items()
    }
    groups: dict[str, dict[str, Tensor]] = {"value": {}, "norm": {}, "head": {}}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, claim in stored.header.claims.items():
        tensor = stored.tensors[key]
        if claim.group == "score":
            layers[claim.name].score = tensor
        elif claim.group == "delta":
            parts.setdefault(claim.name, {})[claim.part] = tensor
        else:
            groups[claim.group][claim.name] = tensor
    for name, pieces in parts.items():
        record = layers[name]
        if decode:
            record.delta, record.parts = _decode(name, record.codec, pieces, path=path), None
        else:
            record.parts = pieces
    return TaskFile(
        kind=metadata.kind,
        method=metadata.method,
        parent=metadata.parent,
        name=metadata.name,
        layers=layers,
        norms=groups["norm"],
        values=groups["value"],
        head=groups["head"],
        head_spec=metadata.head_spec,
        labels=metadata.labels,
        metrics=metadata.metrics,
        versions=metadata.versions,
        extra=dict(metadata.extra),
        path=stored.header.path,
        digest=stored.header.digest,
    )


def _check_record(name: str, record: LayerRecord, *, path: Path) -> None:
    def refuse(problem: str) -> GateRecordError:
        return GateRecordError(path, f"layer {show(name)}: {problem}")

    if type(record.learn) is not bool or type(record.open) is not bool:
        raise refuse(f"expected booleans learn and open, got {show(record.learn)} and {show(record.open)}")
    if record.learn and record.score is None:
        raise refuse("the gate is learned, so a score is expected, got none")
    if not record.learn and record.score is not None:
        raise refuse("the gate is fixed, so no score is expected, got one")
    given = (record.delta is not None) + (record.parts is not None)
    if record.open and given != 1:
        raise refuse(f"open, so one of delta and parts is expected, got {'both' if given else 'neither'}")
    if not record.open and given:
        raise refuse("closed, so no delta is expected, got one")


def _encode(name: str, record: LayerRecord, *, path: Path) -> Mapping[str, Tensor]:
    codec = codecs.get(record.codec, layer=name, path=path)
    if record.delta is not None:
        parts: Mapping[str, Tensor] = codec.encode(name, record.delta)
    else:
        parts = record.parts or {}
    if parts.keys() != set(codec.parts):
        raise CodecError(
            path,
            f"layer {show(name)}: codec {codec.name}: expected parts {sorted(codec.parts)}, got {show(sorted(parts))}",
        )
    return parts


def _decode(name: str, codec: str, parts: Mapping[str, Tensor], *, path: Path) -> Tensor:
    try:
        return codecs.get(codec, layer=name, path=path).decode(name, parts)
    except TaskFileError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:  # parts from a file may be anything
        raise CodecError(path, f"layer {show(name)}: codec {codec} cannot decode its parts: {error}") from error
