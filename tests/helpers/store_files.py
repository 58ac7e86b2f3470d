"""Task files for the store's tests: a small honest one, and a forger that signs whatever it is told to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from taps_ext.store import LayerRecord, TaskFile, save

PARENT = "sha256:" + "ab" * 32
VERSIONS = {"taps_ext": "0", "torch": "0"}


def example(**changes: Any) -> TaskFile:
    """One of everything: learned and fixed gates, each open and closed, norms, a value, a head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    content: dict[str, Any] = {
        "method": {"method": "taps", "lam": 1.0},
        "parent": PARENT,
        "name": "birds",
        "layers": {
            "conv1": LayerRecord(learn=True, open=True, score=torch.tensor(0.15), delta=random(2, 3, 1, 1)),
            "conv2": LayerRecord(learn=True, open=False, score=torch.tensor(0.05)),
            "conv3": LayerRecord(learn=False, open=True, delta=random(3, 2).bfloat16()),
            "conv4": LayerRecord(learn=False, open=False),
        },
        "norms": {
            "bn1.weight": random(2),
            "bn1.running_mean": random(2),
            "bn1.num_batches_tracked": torch.tensor(7),
        },
        "values": {"cls_token": random(1, 1, 2)},
        "head": {"weight": random(2, 2), "bias": random(2)},
        "head_spec": {"type": "linear", "in": 2, "out": 2},
        "labels": ["jay", "wren"],
        "metrics": {"top1": 82.65},
        "versions": dict(VERSIONS),
    }
    return TaskFile(**{**content, **changes})


def tiny() -> TaskFile:
    """As small as a task gets with a delta, a score and a boolean in it."""
    return TaskFile(
        method={"method": "taps"},
        parent=PARENT,
        layers={"a": LayerRecord(learn=True, open=True, score=torch.tensor(0.5), delta=torch.tensor([1.0]))},
        values={"mask": torch.tensor([True])},
        versions=dict(VERSIONS),
    )


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


def blob_of(task: TaskFile, folder: Path) -> bytes:
    """The bytes that `save` writes for `task`."""
    path = folder / "made.taps"
    save(path, task)
    return path.read_bytes()
