"""Task files for the store's tests: a small honest one, and a forger that signs whatever it is told to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taps_ext.store import Record, TaskFile, save
from taps_ext.store.format import DTYPE_NAMES
from taps_ext.store.tensors import to_bytes

PARENT = "sha256:" + "ab" * 32
VERSIONS = {"taps_ext": "0", "torch": "0"}
THRESHOLD = 0.10000000149011612
"""0.1 as a float32."""


def layer(*, learn: bool, open: bool, change: str | None = "dense", **tensors: Tensor) -> Record:
    """A gated layer's record."""
    gate = {"learn": learn, "open": open, "threshold": THRESHOLD}
    return Record({"kind": "layer", "gate": gate, "change": change and {"kind": change}}, tensors)


def own(role: str, **tensors: Tensor) -> Record:
    """The record of a module that the task has tensors of its own for."""
    return Record({"kind": "own", "role": role}, tensors)


def _tensors() -> dict[str, Tensor]:
    """Those of the example, by the names that 1.0 stored them under."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "conv1.score": torch.tensor(0.15),
        "conv1.delta": random(2, 3, 1, 1),
        "conv2.score": torch.tensor(0.05),
        "conv3.delta": random(3, 2).bfloat16(),
        "norm.bn1.weight": random(2),
        "norm.bn1.running_mean": random(2),
        "norm.bn1.num_batches_tracked": torch.tensor(7),
        "cls_token.value": random(1, 1, 2),
        "head.weight": random(2, 2),
        "head.bias": random(2),
    }


def parts() -> dict[str, Record]:
    """One of everything that 1.0 knew: learned and fixed gates, each open and closed, norms, a value, a head."""
    t = _tensors()
    norms = {name: t[f"norm.bn1.{name}"] for name in ("weight", "running_mean", "num_batches_tracked")}
    head = {"kind": "instead", "module": {"type": "linear", "in": 2, "out": 2, "bias": True}}
    return {
        "conv1": layer(learn=True, open=True, score=t["conv1.score"], delta=t["conv1.delta"]),
        "conv2": layer(learn=True, open=False, score=t["conv2.score"]),
        "conv3": layer(learn=False, open=True, delta=t["conv3.delta"]),
        "conv4": layer(learn=False, open=False),
        "bn1": own("norm", **norms),
        "": own("other", cls_token=t["cls_token.value"]),
        "fc": Record(head, {"weight": t["head.weight"], "bias": t["head.bias"]}),
    }


def stranger() -> Record:
    """A part of a kind that nobody here knows."""
    facts = {"kind": "acme.router", "experts": 4, "mix": [0.5, None, True, {"": "鳥"}], "change": [], "role": 3}
    return Record(facts, {"score": torch.ones(2), "a.b:c": torch.tensor([True]), "weight~": torch.zeros(0, 3)})


def example(**changes: Any) -> TaskFile:
    """A task with one of everything, a stranger's part among it."""
    content: dict[str, Any] = {
        "method": {"method": "taps", "lam": 1.0},
        "parent": PARENT,
        "name": "birds",
        "parts": {**parts(), "blocks.0": stranger()},
        "labels": ["jay", "wren"],
        "metrics": {"top1": 82.65},
        "versions": dict(VERSIONS),
    }
    return TaskFile(**{**content, **changes})


def tiny() -> TaskFile:
    """As small as a task gets with a change, a score and a boolean in it."""
    return TaskFile(
        method={"method": "taps"},
        parent=PARENT,
        parts={
            "": own("other", mask=torch.tensor([True])),
            "a": layer(learn=True, open=True, score=torch.tensor(0.5), delta=torch.tensor([1.0])),
        },
        versions=dict(VERSIONS),
    )


def state(**changes: Any) -> TaskFile:
    """The state of a run."""
    values = {"part:a": torch.arange(3.0), "part:b~": torch.tensor([True]), "a.value": torch.tensor(1)}
    content: dict[str, Any] = {"kind": "state", "parent": PARENT, "name": "birds", "values": values}
    return TaskFile(**{**content, "versions": dict(VERSIONS), **changes})


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def assemble(header: bytes, data: bytes, *, length: int | None = None) -> bytes:
    """Length prefix (padded header if `length` is not forced), header and data."""
    if length is None:
        header += b" " * (-len(header) % 8)
        length = len(header)
    return length.to_bytes(8, "little") + header + data


@dataclass
class Draft:
    """A task file taken apart. Change anything; `build` signs it again, so that only the content is bad."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, list[Any], bytes]]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides of header entries
    digests: dict[str, str | None] = field(default_factory=dict)  # overrides of tensor digests
    trailing: bytes = b""
    text: list[tuple[str, str]] = field(default_factory=list)  # replacements in the signed header

    @classmethod
    def of(cls, blob: bytes) -> Draft:
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        data = blob[8 + length :]
        metadata = header.pop("__metadata__")
        tensors = {n: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for n, t in header.items()}
        return cls(metadata, tensors)

    def edit(self, key: str, change: Any) -> None:
        """Applies `change` to the parsed JSON of one metadata entry, in place."""
        value = json.loads(self.metadata[key])
        change(value)
        self.metadata[key] = canonical(value)

    def build(self) -> bytes:
        widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
        order = sorted(self.tensors, key=lambda n: (-widths.get(self.tensors[n][0], 1), n))
        table: dict[str, Any] = {}
        digests: dict[str, str | None] = {}
        data = b""
        for name in order:
            dtype, shape, raw = self.tensors[name]
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            table[name].update(self.entries.get(name, {}))
            seed = json.dumps([dtype, shape]).encode() + b"\n"
            digests[name] = "sha256:" + hashlib.sha256(seed + raw).hexdigest()
            data += raw
        digests.update(self.digests)
        strings = {k: v for k, v in self.metadata.items() if k != "taps.digest"}
        if "taps.digests" in strings:
            strings["taps.digests"] = canonical({k: v for k, v in digests.items() if v is not None})
        if "taps.digest" in self.metadata:
            unsigned = assemble(self._header(strings, table), b"")
            strings["taps.digest"] = "sha256:" + hashlib.sha256(unsigned).hexdigest()
        header = self._header(strings, table)
        for old, new in self.text:
            assert old.encode() in header, old
            header = header.replace(old.encode(), new.encode("utf-8", "surrogatepass"), 1)
        return assemble(header, data + self.trailing)

    @staticmethod
    def _header(strings: dict[str, Any], table: dict[str, Any]) -> bytes:
        entries = [canonical({"__metadata__": strings})[1:-1]]
        entries += [
            json.dumps(name, ensure_ascii=False) + ":" + json.dumps(entry, separators=(",", ":"))
            for name, entry in table.items()
        ]
        return ("{" + ",".join(entries) + "}").encode("utf-8", "surrogatepass")


def older(
    tensors: dict[str, Tensor] | None = None,
    *,
    layers: dict[str, Any] | None = None,
    codecs: dict[str, str] | None = None,
    contents: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
    **entries: str,
) -> Draft:
    """A task file as 0.1 wrote it (format 1.0); further `entries` by name."""
    empty: dict[str, list[str]] = {"head": [], "norms": [], "values": []}
    metadata = {
        "format": "1.0",
        "kind": "task",
        "parent": PARENT,
        "method": canonical({"method": "taps", "lam": 1.0}),
        "layers": canonical(layers or {}),
        "codecs": canonical(codecs or {}),
        "contents": canonical({**empty, **(contents or {})}),
        "versions": canonical(VERSIONS),
        "digests": "",
        "digest": "",
        **({} if head is None else {"head": canonical(head)}),
        **entries,
    }
    taken = {n: (DTYPE_NAMES[t.dtype], list(t.shape), bytes(to_bytes(t)[0])) for n, t in (tensors or {}).items()}
    return Draft({f"taps.{key}": value for key, value in metadata.items()}, taken)


def older_example() -> Draft:
    """What 0.1 wrote of `parts()`, to the byte."""
    gates = {"conv1": (True, True), "conv2": (True, False), "conv3": (False, True), "conv4": (False, False)}
    return older(
        _tensors(),
        layers={name: {"learn": learn, "open": open} for name, (learn, open) in gates.items()},
        codecs={"conv1": "dense", "conv3": "dense"},
        contents={
            "head": ["bias", "weight"],
            "norms": ["bn1.num_batches_tracked", "bn1.running_mean", "bn1.weight"],
            "values": ["cls_token"],
        },
        head={"type": "linear", "module": "fc", "in": 2, "out": 2, "bias": True},
        name="birds",
        labels=canonical(["jay", "wren"]),
        metrics=canonical({"top1": 82.65}),
    )


def blob_of(task: TaskFile, folder: Path) -> bytes:
    """The bytes that `save` writes for `task`."""
    path = folder / "made.taps"
    save(path, task)
    return path.read_bytes()
