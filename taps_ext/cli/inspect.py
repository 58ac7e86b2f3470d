"""`taps inspect`: what a task file holds, from its header."""

from __future__ import annotations

import argparse
import json
import struct
from typing import TYPE_CHECKING, Any

from ..errors import TapsError
from .common import KINDS, emit, size, table

if TYPE_CHECKING:
    from ..store import FileHeader

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

    data = header.file_bytes - sum(info.nbytes for info in header.tensors.values())
    scores = {}
    with open(header.path, "rb") as file:
        for stored, claim in header.claims.items():
            if claim.group != "score":
                continue
            file.seek(data + header.tensors[stored].begin)
            raw = file.read(4)
            (score,) = struct.unpack("<f", raw) if len(raw) == 4 else (float("nan"),)
            tensor = torch.tensor(score, dtype=torch.float32)
            digest = store.tensor_digest(tensor, name=stored, path=header.path)
            if digest != header.digests[stored]:
                raise TapsError(f"{header.path}: tensor {stored!r}: expected the bytes written, got others")
            scores[claim.name] = score
    return scores


def describe(header: FileHeader) -> dict[str, Any]:
    """The header of a task file, JSON-ready."""
    meta, scores = header.metadata, _scores(header)
    stored: dict[str, int] = {}
    groups = {"norms": 0, "values": 0, "head": 0}
    shapes: dict[str, list[int]] = {}
    for name, claim in header.claims.items():
        info = header.tensors[name]
        if claim.group == "delta":
            stored[claim.name] = stored.get(claim.name, 0) + info.nbytes
            shapes[claim.name] = list(info.shape)
        elif claim.group != "score":
            groups[{"norm": "norms", "value": "values"}.get(claim.group, claim.group)] += info.nbytes
    layers = [
        {
            "layer": name,
            "open": entry.open,
            "learned": entry.learn,
            "score": scores.get(name),
            "codec": entry.codec,
            "shape": shapes.get(name) if entry.codec == "dense" else None,
            "bytes": stored.get(name, 0),
        }
        for name, entry in meta.layers.items()
    ]
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
        "layers_open": sum(entry.open for entry in meta.layers.values()),
        "layers": layers,
        "bytes_of": {"deltas": sum(stored.values()), **groups},
        "head": meta.head_spec,
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
    print("bytes    " + ", ".join(f"{group} {count:,}" for group, count in of.items()))
    if facts["head"] is not None:
        print(f"head     {_settings(facts['head'])}")
    if labels is not None:
        shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        print(f"labels   {len(labels)}: {shown}")
    if facts["metrics"] is not None:
        print(f"metrics  {_settings(facts['metrics'])}")
    if not facts["layers"]:
        return 0
    print(f"layers   {facts['layers_open']} of {len(facts['layers'])} open\n")
    rows = [
        (
            layer["layer"],
            "open" if layer["open"] else "closed",
            "fixed" if layer["score"] is None else f"{layer['score']:.4f}",
            layer["codec"] or "",
            f"{layer['bytes']:,}",
        )
        for layer in facts["layers"]
    ]
    print(table(("layer", "gate", "score", "codec", "bytes"), rows))
    return 0
