"""`taps inspect`: what a task file holds, from its header."""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .common import KINDS, emit, size, table

if TYPE_CHECKING:
    from ..store import FileHeader, TensorInfo

PURPOSE = "Show what a task file holds: method, parent, layers, gates, metrics, labels. Loads no tensors."
MORE = """

The state of an unfinished training run (.state) is shown as what it is, with how far the run has come."""
EXAMPLE = "taps inspect runs/signs/signs.taps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a task file (.taps)")


def _scores(header: FileHeader) -> dict[str, float]:
    """The scores, read where they lie: four bytes each, checked against their digests."""
    import torch

    from .. import store
    from ..store.errors import DigestError, GateRecordError

    data = header.data_begin
    scores = {}
    with open(header.path, "rb") as file:
        for stored, claim in header.claims.items():
            if not claim.score:
                continue
            file.seek(data + header.tensors[stored].begin)
            raw = file.read(4)
            (score,) = struct.unpack("<f", raw) if len(raw) == 4 else (float("nan"),)
            tensor = torch.tensor(score, dtype=torch.float32)
            digest = store.tensor_digest(tensor, name=stored, path=header.path)
            if digest != header.digests[stored]:
                raise DigestError(header.path, f"tensor {stored!r}: expected the bytes written, got others")
            if not math.isfinite(score):
                raise GateRecordError(header.path, f"tensor {stored!r}: expected a finite score, got {score}")
            scores[claim.module] = score
    return scores


def _group(facts: Mapping[str, Any]) -> str:
    """What the tensors of a part without a gate count as."""
    kind, role = facts["kind"], facts.get("role")
    if kind == "own" and role in ("norm", "other"):
        return "norms" if role == "norm" else "values"
    return "head" if kind == "instead" and isinstance(facts.get("module"), dict) else "parts"


def _change(facts: Mapping[str, Any]) -> str | None:
    """The kind of a layer's change, None where it has none."""
    change = facts.get("change")
    kind = change.get("kind") if isinstance(change, dict) else None
    return kind if isinstance(kind, str) else None


def _errors(facts: Mapping[str, Any]) -> dict[str, float]:
    """What packing lost of a layer, where it was packed: relative, of its Delta and of its outputs."""
    packed = facts.get("packed")
    known = packed if isinstance(packed, dict) else {}
    return {key: known[key] for key in ("error", "output_error") if isinstance(known.get(key), float)}


def describe(header: FileHeader) -> dict[str, Any]:
    """The header of a task file, JSON-ready.

    `layers` are the parts that have a gate, `head` is what takes the head's place (with its `module`), and `parts` are
    what this package has no word for: parts of other kinds, and heads beyond the first.
    """
    meta, scores = header.metadata, _scores(header)
    sizes = dict.fromkeys(("deltas", "norms", "values", "head", "parts"), 0)
    tensors: dict[str, dict[str, TensorInfo]] = {module: {} for module in meta.parts}
    for stored, claim in header.claims.items():
        if meta.kind == "state":
            sizes["values"] += header.tensors[stored].nbytes
        else:
            tensors[claim.module][claim.tensor] = header.tensors[stored]
    layers: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    head: dict[str, Any] | None = None
    for module, (facts, _) in meta.parts.items():
        own, gate = tensors[module], facts.get("gate")
        if gate is not None:
            bias = own.pop("bias", None)
            sizes["values"] += 0 if bias is None else bias.nbytes
            own.pop("score", None)
            shapes = [list(info.shape) for info in own.values()]
            layers.append(
                {
                    "layer": module,
                    "open": gate["open"],
                    "learned": gate["learn"],
                    "score": scores.get(module),
                    "change": _change(facts),
                    "shape": shapes[0] if len(shapes) == 1 else None,
                    "bytes": sum(info.nbytes for info in own.values()),
                }
            )
            layers[-1] |= _errors(facts)
            sizes["deltas"] += layers[-1]["bytes"]
            continue
        group, count = _group(facts), sum(info.nbytes for info in own.values())
        if group == "head" and head is None:
            head = {"module": module, **facts["module"]}
        elif group in ("head", "parts"):
            group = "parts"
            others.append({"part": module, "kind": facts["kind"], "tensors": len(own), "bytes": count})
        sizes[group] += count
    return {
        "file": header.path,
        "kind": meta.kind,
        "task": meta.name,
        "method": meta.method,
        "parent": meta.parent,
        "digest": header.digest,
        "versions": meta.versions,
        "bytes": header.file_bytes,
        "tensors": len(header.tensors),
        "layers_open": sum(layer["open"] for layer in layers),
        "layers": layers,
        "parts": others,
        "bytes_of": sizes,
        "head": head,
        "labels": meta.labels,
        "metrics": meta.metrics,
        "extra": dict(meta.extra),
    }


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, {}, []))


def _stands(extra: dict[str, str]) -> str:
    """How far a run has come, from its state's counters."""
    try:
        progress = json.loads(extra["train.counters"])["progress"]
        return f"{progress['epoch']} epochs done, {progress['step']} steps"
    except (KeyError, TypeError, ValueError):  # a state of somebody else's
        return "not of this package's trainer"


def run(args: argparse.Namespace) -> int:
    from .. import store

    facts = describe(store.read_header(args.file))
    if args.json:
        emit(facts)
        return 0
    of, labels = facts["bytes_of"], facts["labels"]
    total, tensors = size(facts["bytes"]), facts["tensors"]
    named = f" {facts['task']!r}" if facts["task"] else ""
    print(f"{facts['file']}: {KINDS[facts['kind']]}{named}, {total}, {tensors} tensors")
    if facts["kind"] == "state":
        print(f"run      {_stands(facts['extra'])}; to go on, train with the same settings and out")
    else:
        print(f"method   {_settings(facts['method'])}")
    print(f"parent   {facts['parent']}")
    print(f"digest   {facts['digest']}")
    print(f"written  by {_settings(facts['versions'])}")
    print("bytes    " + ", ".join(f"{group} {count:,}" for group, count in of.items() if count or group != "parts"))
    if facts["head"] is not None:
        print(f"head     {_settings(facts['head'])}")
    if labels is not None:
        shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        print(f"labels   {len(labels)}: {shown}")
    if facts["metrics"] is not None:
        print(f"metrics  {_settings(facts['metrics'])}")
    if facts["layers"]:
        print(f"layers   {facts['layers_open']} of {len(facts['layers'])} open\n")
        packed = any("error" in layer for layer in facts["layers"])
        rows = [
            (
                layer["layer"],
                "open" if layer["open"] else "closed",
                "fixed" if layer["score"] is None else f"{layer['score']:.4f}",
                layer["change"] or "",
                f"{layer['bytes']:,}",
                *([f"{layer['error']:.2e}" if "error" in layer else ""] if packed else []),
            )
            for layer in facts["layers"]
        ]
        print(table(("layer", "gate", "score", "change", "bytes", *(["error"] if packed else [])), rows))
    if facts["parts"]:
        strangers = [(part["part"], part["kind"], part["tensors"], f"{part['bytes']:,}") for part in facts["parts"]]
        print("\n" + table(("part", "kind", "tensors", "bytes"), strangers))
    return 0
