"""Packing a task's file as it is, without its base: the same choices as in memory, a layer at a time; and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import store
from ..errors import ConfigError
from ..ops.codec import CODECS
from ..parts.packing import LOW_RANK, Packed, Rule, choose, decode
from ..store.errors import LimitError, MetadataError, PackedTensorError
from ..store.metadata import INCOMPLETE
from ..store.record import Record

_DENSE, _WHOLE = {"kind": "dense"}, {"kind": "whole"}
_MOST = 1 << 31  # elements of a Delta that is made of two thin factors, which its file's size says nothing of


@dataclass(frozen=True)
class PackedRow:
    """One open layer.

    Attributes:
        layer: its name. codec: how it is held now, "dense" for a layer that was left as it is.
        before, bytes: of its tensors. error: |Delta - packed| / |Delta|, Frobenius norms.
        output_error: the same of what Delta adds to the layer's outputs on the data, None where none was measured.
    """

    layer: str
    codec: str
    before: int
    bytes: int
    error: float
    output_error: float | None = None


@dataclass(frozen=True)
class Packing:
    """What packing did to a task's open layers, in their order."""

    task: str
    rows: list[PackedRow] = field(repr=False)

    @property
    def before(self) -> int:
        """The bytes of these layers as they were."""
        return sum(row.before for row in self.rows)

    @property
    def bytes(self) -> int:
        """The bytes of these layers now."""
        return sum(row.bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "before": self.before, "bytes": self.bytes}

    def table(self) -> str:
        """A plain-text table with a line for each layer and the totals."""
        width = max([5, *(len(row.layer) for row in self.rows)])
        measured = any(row.output_error is not None for row in self.rows)
        head = f"{'layer':<{width}}  codec             before        bytes     error"
        lines = [head + ("  of outputs" if measured else "")]
        for row in self.rows:
            line = f"{row.layer:<{width}}  {row.codec:<12} {row.before:12,} {row.bytes:12,} {row.error:9.2e}"
            shown = "-" if row.output_error is None else f"{row.output_error:.2e}"
            lines.append(line + (f"  {shown:>10}" if measured else ""))
        share = self.bytes / self.before if self.before else 1.0
        lines.append(f"{self.task}: {self.before:,} bytes of open layers in {self.bytes:,} ({share:.3f}x)")
        return "\n".join(lines)

    __str__ = table


def is_delta(record: Record) -> bool:
    """Whether a record is that of a layer whose Delta can be packed."""
    return record.facts.get("change") == _DENSE and "packed" not in record.facts and "delta" in record.tensors


def delta_of(record: Record) -> Tensor | None:
    """The Delta of an open layer, packed or not, float32 of its weight's shape; None for other parts.

    Raises:
        TaskFileError: a packed one that no packing gives, naming the tensor.
    """
    if is_delta(record):
        return record.tensors["delta"]
    if "packed" not in record.facts:
        return None
    packed, change = Packed.of(record), record.fact("change", dict)
    kind, rows, columns = change.get("kind"), packed.shape[0], math.prod(packed.shape[1:])
    if not _opened(record):
        return None
    if kind == LOW_RANK:
        rank, scale = change.get("rank"), change.get("scale")
        if type(rank) is not int or type(scale) is not float or not math.isfinite(scale):
            raise record.refuse(f"change {kind!r}: expected a rank and a scale")
        if rows * columns > _MOST:
            raise record.refuse(f"packed: {rows * columns:,} elements, at most {_MOST:,} allowed here", LimitError)
        wanted = {"down": ([rank, columns], torch.float32), "up": ([rows, rank], torch.float32)}
        tensors = record.take(wanted)
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise record.refuse_tensor(name, "expected finite values", PackedTensorError)
        return decode(kind, tensors, packed.shape, scale)
    codec = CODECS.get(kind) if isinstance(kind, str) else None
    settings = {name: value for name, value in change.items() if name != "kind"}
    known = codec is not None and settings.keys() == set(codec.settings)
    if codec is None or not known or not all(type(v) is int and v >= 0 for v in settings.values()):
        raise record.refuse(f"packed: expected a change that packing makes, got {str(change)[:96]}")
    layout = codec.layout(rows, columns, **settings)
    tensors = record.take(layout, free=layout)  # the codec proves them
    if (problem := codec.problem(tensors, rows, columns)) is not None:
        raise record.refuse_tensor(problem[0], f"{kind}: {problem[1]}", PackedTensorError)
    return decode(codec.kind, tensors, packed.shape)


def _complete(file: store.TaskFile, path: str | PathLike[str]) -> None:
    if not file.complete:
        raise MetadataError(path, INCOMPLETE)


def _opened(record: Record) -> bool:
    gate = record.facts.get("gate")
    return isinstance(gate, dict) and gate.get("open") is True


def pack_file(path: str | PathLike[str], out: str | PathLike[str], rule: Rule) -> tuple[Packing, int]:
    """Write a task's file with its Deltas packed, and the bytes written. No base is needed; of what is packed one layer
    is in memory at a time. Whole weights, which a converted checkpoint may have, stay: "whole" in the table.

    Raises:
        TaskFileError: no sound task file, or one of format 1.0 that does not list its parts. ConfigError: a layer that
            is packed already, what a codec cannot hold, a budget that is too small, or one for whole weights.
    """
    with store.opened(path, kind="task") as file:
        _complete(file, path)
        found = dict(file.parts)
        for name, record in found.items():
            if "packed" in record.facts:
                raise ConfigError(f"pack: {path}: {name} is packed already; `taps unpack` first")
        deltas: dict[str, Callable[[], Tensor]] = {}
        for name, record in found.items():
            if is_delta(record):
                deltas[name] = lambda record=record: _proven(record)  # type: ignore[misc]
        whole = [name for name, record in found.items() if record.facts.get("change") == _WHOLE and _opened(record)]
        if whole and rule.budget is not None:
            raise ConfigError(
                f"budget: {path}: {whole[0]} (of {len(whole)}) is a whole weight, whose Delta only a model with the "
                "base knows: load the task there and call pack_task"
            )
        sizes = {name: sum(found[name].like(t).nbytes for t in found[name].tensors) for name in whole}
        rows = [PackedRow(name, "whole", sizes[name], sizes[name], 0.0) for name in whole]
        for name, choice in choose(rule, deltas):
            rows.append(PackedRow(name, choice.codec, 4 * math.prod(choice.shape), choice.nbytes, choice.error))
            if choice.made is not None:
                found[name] = _packed(found[name], choice.made, Packed(choice.error, choice.shape))
        written = _save(file, found, out)
    return Packing(file.name, rows), written


def _proven(record: Record) -> Tensor:
    delta = record.tensors["delta"]
    if delta.dtype != torch.float32 or delta.dim() < 2:
        raise record.refuse_tensor("delta", "expected a float32 Delta of two dimensions or more", MetadataError)
    return delta


def _packed(record: Record, made: Any, packed: Packed) -> Record:
    kept = {name: tensor for name, tensor in record.tensors.items() if name != "delta"}
    facts = {**record.facts, "change": {"kind": made.kind, **made.settings}, "packed": packed.facts()}
    return dataclasses.replace(record, facts=facts, tensors={**kept, **made.tensors})


def unpack_file(path: str | PathLike[str], out: str | PathLike[str]) -> tuple[list[str], int]:
    """Write a packed task's file with what it holds as Deltas, which train; the layers, and the bytes written.

    Raises:
        TaskFileError: no sound task file, or packed tensors that no packing gives. ConfigError: nothing is packed.
    """
    layers = []
    with store.opened(path, kind="task") as file:
        _complete(file, path)
        found = dict(file.parts)
        for name, record in file.parts.items():
            if "packed" not in record.facts:
                continue
            layers.append(name)
            delta = delta_of(record)
            facts = {key: value for key, value in record.facts.items() if key != "packed"}
            kept = {n: record.tensors[n] for n in ("bias", "score") if n in record.tensors}
            tensors = kept if delta is None else {**kept, "delta": delta}
            found[name] = dataclasses.replace(record, facts={**facts, "change": dict(_DENSE)}, tensors=tensors)
        if not layers:
            raise ConfigError(f"unpack: {path}: expected a packed task, got one without packed layers")
        written = _save(file, found, out)
    return layers, written


def _save(file: store.TaskFile, found: dict[str, Record], out: str | PathLike[str]) -> int:
    return store.save(Path(out), dataclasses.replace(file, parts=found, versions=store.current_versions()))


# ------------------------------------------------------------------------------------------------ two files


@dataclass(frozen=True)
class Difference:
    """One part of two files.

    Attributes:
        part: its module. what: "same", "changed", "only in the first", "only in the second" or "other shapes".
        kinds: of what each holds there ("" for nothing, a closed layer too).
        distance: |first - second| / |first| over what both hold, None where they cannot be compared.
    """

    part: str
    what: str
    kinds: tuple[str, str]
    distance: float | None


def diff_files(first: str | PathLike[str], second: str | PathLike[str]) -> list[Difference]:
    """How two tasks' files differ, part by part, packed or not; without a base, one part of each in memory.

    Raises:
        TaskFileError: no sound task file.
    """
    with store.opened(first, kind="task") as one, store.opened(second, kind="task") as other:
        left, right = one.parts, other.parts
        return [_difference(name, left.get(name), right.get(name)) for name in dict.fromkeys([*left, *right])]


def _held(record: Record | None) -> tuple[str, dict[str, Tensor]]:
    """What a part holds, by a word for its kind, scores aside."""
    if record is None:
        return "", {}
    change = record.facts.get("change")
    kind = change.get("kind") if isinstance(change, dict) else record.facts["kind"]
    bias = {"bias": record.tensors["bias"]} if "gate" in record.facts and "bias" in record.tensors else {}
    if (delta := delta_of(record)) is not None:
        return str(kind), {**bias, "delta": delta}
    tensors = {name: record.tensors[name] for name in record.tensors if name != "score" or "gate" not in record.facts}
    return (str(kind) if tensors else ""), tensors


def _difference(name: str, first: Record | None, second: Record | None) -> Difference:
    (one, left), (other, right) = _held(first), _held(second)
    kinds = one, other
    if not left or not right:
        what = "only in the first" if left else "only in the second" if right else "same"
        return Difference(name, what, kinds, None if left or right else 0.0)
    if {n: t.shape for n, t in left.items()} != {n: t.shape for n, t in right.items()}:
        return Difference(name, "other shapes", kinds, None)
    lost = sum(float((left[n].double() - right[n].double()).square().sum()) for n in left) ** 0.5
    size = sum(float(tensor.double().square().sum()) for tensor in left.values()) ** 0.5
    same = all(torch.equal(left[n], right[n]) for n in left)
    return Difference(name, "same" if same else "changed", kinds, lost / size if size else 0.0 if same else math.inf)
