"""`taps inspect` and `taps verify` of files that no model here made: parts of any kind, both layouts, states."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from store_files import Draft, Record, blob_of, example, layer, older_example, own, parts, state

from taps_ext import store
from taps_ext.cli import inspect


def described(file: Path, capsys: pytest.CaptureFixture[str], task: store.TaskFile | bytes) -> tuple[Any, str]:
    """What inspect says of a file: its JSON, and its text."""
    if isinstance(task, bytes):
        file.write_bytes(task)
    else:
        store.save(file, task)
    facts = inspect.describe(store.read_header(file))
    assert inspect.run(inspect.argparse.Namespace(file=str(file), json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {**facts, "file": str(file)}
    assert inspect.run(inspect.argparse.Namespace(file=str(file), json=False)) == 0
    return facts, capsys.readouterr().out


LAYERS = [
    {"layer": "conv1", "open": True, "learned": True, "change": "dense", "shape": [2, 3, 1, 1], "bytes": 24},
    {"layer": "conv2", "open": False, "learned": True, "change": "dense", "shape": None, "bytes": 0},
    {"layer": "conv3", "open": True, "learned": False, "change": "dense", "shape": [3, 2], "bytes": 12},
    {"layer": "conv4", "open": False, "learned": False, "change": "dense", "shape": None, "bytes": 0},
]
SCORES = [torch.tensor(0.15).item(), torch.tensor(0.05).item(), None, None]


@pytest.mark.parametrize("layout", ["1.0", "1.2"])
def test_both_layouts_are_told_alike(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = older_example().build() if layout == "1.0" else example(parts=parts())
    facts, text = described(tmp_path / "a.taps", capsys, task)
    assert facts["layers"] == [{**row, "score": score} for row, score in zip(LAYERS, SCORES, strict=True)]
    assert facts["layers_open"] == 2 and facts["parts"] == []
    assert facts["bytes_of"] == {"deltas": 36, "norms": 24, "values": 8, "head": 24, "parts": 0}
    assert facts["head"] == {"module": "fc", "type": "linear", "in": 2, "out": 2, "bias": True}
    assert "bytes    deltas 36, norms 24, values 8, head 24\n" in text and "layers   2 of 4 open" in text
    assert [line.split()[1:4] for line in text.splitlines() if line.startswith("conv")] == [
        ["open", "0.1500", "dense"],
        ["closed", "0.0500", "dense"],
        ["open", "fixed", "dense"],
        ["closed", "fixed", "dense"],
    ]


def test_parts_of_other_kinds_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = {"kind": "instead", "module": {"type": "custom", "class": "Decoder"}}
    table = {
        "a.head": Record(head, {"weight": torch.ones(1)}),
        "b.head": Record(head, {"weight": torch.ones(2), "bias": torch.ones(2)}),
        "blocks.0": Record({"kind": "acme.router", "role": "norm"}, {"weight": torch.ones(3)}),
        "low": layer(learn=False, open=True, change="lowrank", a=torch.ones(4), b=torch.ones(5), bias=torch.ones(6)),
        "none": layer(learn=False, open=False, change=None),
        "odd": Record({"kind": "own", "role": "guest"}),
        "strange": Record(
            {"kind": "acme.gated", "gate": {"learn": True, "open": True, "threshold": 0.5}, "change": 7},
            {"score": torch.tensor(0.75), "what": torch.ones(7)},
        ),
    }
    facts, text = described(tmp_path / "a.taps", capsys, example(parts=table))
    assert facts["head"] == {"module": "a.head", "type": "custom", "class": "Decoder"}
    assert facts["bytes_of"] == {"deltas": 64, "norms": 0, "values": 24, "head": 4, "parts": 28}
    assert facts["parts"] == [
        {"part": "b.head", "kind": "instead", "tensors": 2, "bytes": 16},
        {"part": "blocks.0", "kind": "acme.router", "tensors": 1, "bytes": 12},
        {"part": "odd", "kind": "own", "tensors": 0, "bytes": 0},
    ]
    found = {row["layer"]: (row["change"], row["shape"], row["bytes"], row["score"]) for row in facts["layers"]}
    assert found == {
        "low": ("lowrank", None, 36, None),
        "none": (None, None, 0, None),
        "strange": (None, [7], 28, 0.75),
    }
    assert "parts 28" in text and "acme.router" in text and "layers   2 of 3 open" in text


def test_a_file_without_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, text = described(tmp_path / "a.taps", capsys, example(parts={"": own("other", token=torch.ones(2))}))
    assert facts["bytes_of"]["values"] == 8 and facts["head"] is None and "\nlayers" not in text
    facts, text = described(tmp_path / "a.state", capsys, state())
    assert facts["kind"] == "state" and facts["layers"] == facts["parts"] == [] and "\nlayers" not in text
    assert facts["bytes_of"] == {"deltas": 0, "norms": 0, "values": 21, "head": 0, "parts": 0}


@pytest.mark.parametrize("layout", ["1.0", "1.2"])
def test_a_changed_score_is_noticed(layout: str, tmp_path: Path) -> None:
    blob = bytearray(older_example().build() if layout == "1.0" else blob_of(example(), tmp_path))
    file = tmp_path / "a.taps"
    file.write_bytes(blob)
    header = store.read_header(file)
    stored = next(name for name, claim in header.claims.items() if claim.score)
    begin = header.file_bytes - sum(info.nbytes for info in header.tensors.values()) + header.tensors[stored].begin
    blob[begin] ^= 1
    file.write_bytes(blob)
    with pytest.raises(store.errors.DigestError, match=f"tensor '{stored}': expected the bytes written"):
        inspect.describe(store.read_header(file))
    draft = Draft.of(bytes(blob))
    draft.tensors[stored] = ("F32", [], struct.pack("<f", float("inf")))
    file.write_bytes(draft.build())
    with pytest.raises(store.errors.GateRecordError, match=f"tensor '{stored}': expected a finite score, got inf"):
        inspect.describe(store.read_header(file))
