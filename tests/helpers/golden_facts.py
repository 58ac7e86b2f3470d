"""What `tests/files/golden/facts.json` says of a task file, worked out from its parts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from taps_ext.store import Record, TaskFile

_CODECS = {"dense": ("dense", "delta"), "whole": ("weight", "weight")}  # kind of change -> 0.1's codec, our tensor


def digest(tensor: torch.Tensor) -> str:
    """As `golden/make.py` took it."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + flat).hexdigest()[:24]


def golden_facts(record: TaskFile) -> dict[str, Any]:
    """The facts in the shape of `facts(record)` of `golden/make.py`, where 0.1's words stand for ours."""
    layers: dict[str, Any] = {}
    norms: dict[str, str] = {}
    values: dict[str, str] = {}
    head: dict[str, str] = {}
    head_spec = None
    for module, part in record.parts.items():
        tensors = {name: digest(tensor) for name, tensor in part.tensors.items()}
        full = {f"{module}.{name}" if module else name: found for name, found in tensors.items()}
        kind = part.facts["kind"]
        if kind == "layer":
            layers[module] = _layer(part, tensors)
            values |= {name: found for name, found in full.items() if name.rpartition(".")[2] == "bias"}
        elif kind == "own":
            (norms if part.facts["role"] == "norm" else values).update(full)
        else:
            assert kind == "instead" and head_spec is None
            head, head_spec = tensors, {"module": module, **part.facts["module"]}
    keys = ("method", "parent", "name", "kind", "labels", "metrics")
    known = {key: getattr(record, key) for key in keys}
    groups = {"layers": layers, "norms": norms, "values": values, "head": head}
    return {**known, "head_spec": head_spec, "extra": dict(record.extra), **groups}


def _layer(part: Record, tensors: dict[str, str]) -> dict[str, Any]:
    gate, change = part.facts["gate"], part.facts["change"]
    codec, name = _CODECS[change["kind"]] if gate["open"] else (None, "")
    assert tensors.keys() - {"bias"} == {*(["score"] if gate["learn"] else []), *([name] if name else [])}
    flags = {"learn": gate["learn"], "open": gate["open"], "codec": codec}
    return {**flags, "score": tensors.get("score"), "delta": tensors.get(name)}
