"""`taps profile` and `taps estimate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from taps_ext import TapsConfig, TaskModel

SMALL = ("python:test_cli_costs.small", "--shape", "3,16,16", "--batch", 2)


def small() -> nn.Module:
    """The base of these tests."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 4))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))


def test_profile(call, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = call("profile", *SMALL, "--steps", 1, "--open", "0", "--plot", tmp_path / "a.png")
    assert code == 0 and (tmp_path / "a.png").stat().st_size > 10_000
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["0", "open", "rebuild"] and lines[2].split()[:3] == ["2", "closed", "stock"]
    assert "train step" in out and "peak" in out


def test_the_fraction_is_counted(call) -> None:
    work = {}
    for fraction in ("1", "0.5"):
        out = call("profile", *SMALL, "--steps", 1, "--open", "0", "--gate-fraction", fraction, "--json")[1]
        work[fraction] = json.loads(out)["layers"][1]["operations"]
    assert work["0.5"] * 6 == work["1"] * 5  # forward, input gradient, and half of the weight's


def test_profile_as_json(call) -> None:
    code, out, _ = call("profile", *SMALL, "--steps", 1, "--phase", "infer", "--json", "--optimizer", "adamw")
    found = json.loads(out)
    assert code == 0 and found["phase"] == "infer" and [row["layer"] for row in found["layers"]] == ["0", "2"]
    assert found["memory"]["peak"] == max(count for _, count in found["timeline"])
    step = found["step"]
    assert step["batch"] == 2 and step["shape"] == [3, 16, 16] and step["optimizer"] == "adamw" and step["amp"] is None


def test_estimate(call) -> None:
    code, out, _ = call("estimate", *SMALL, "--json")
    memory = json.loads(out)
    work = memory.pop("operations")
    assert work == {"forward": work["forward"], "added": work["forward"], "first": "0"} and work["forward"] > 0
    assert code == 0 and memory["peak"] == sum(value for part, value in memory.items() if part != "peak")
    assert memory["inputs"] == 2 * 3 * 16 * 16 * 4
    code, table, _ = call("estimate", *SMALL)
    assert "GFLOP to a model that runs others, from 0 on" in table
    assert code == 0 and "activations" in table and "peak" in table and "a lower bound where there are" in table
    adam = json.loads(call("estimate", *SMALL, "--optimizer", "adamw", "--json")[1])
    assert 1.9 * memory["optimizer"] < adam["optimizer"] < 2.1 * memory["optimizer"]


@pytest.mark.parametrize("method", ["lora:2", "separate:top=1", "scale-bias", "joint-taps:gate_fraction=0.5", "bitfit"])
def test_any_method(call, method: str) -> None:
    code, out, _ = call("estimate", *SMALL, "--method", method, "--json")
    assert code == 0 and json.loads(out)["operations"]["added"] > 0
    code, out, _ = call("profile", *SMALL, "--method", method, "--steps", 1, "--json")
    found = json.loads(out)
    assert code == 0 and found["step"]["method"] == method
    assert found["operations"]["first"] == ("2" if method == "separate:top=1" else "0")


def test_a_task_file_gives_the_gates(call, tmp_path) -> None:
    model = TaskModel(small(), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=4)
    model.set_gates("t", open=["2"])
    model.save_task("t", tmp_path / "t.taps")
    code, out, _ = call("profile", *SMALL, "--steps", 1, "--task", tmp_path / "t.taps", "--json")
    assert code == 0 and [row["gate"] for row in json.loads(out)["layers"]] == ["closed", "open"]
    code, out, error = call("estimate", *SMALL, "--task", tmp_path / "t.taps", "--open", "0")
    assert (code, out) == (2, "") and "open: expected none beside a task file" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plot", "p.foo"), "plot: expected a name that ends in .png"),
        (("--plot", "nowhere/p.png"), "plot: expected a folder that exists"),
        (("--device", "meta"), "device: expected one that computes"),
    ],
)
def test_a_profile_is_refused_before_it_is_measured(call, words, message) -> None:
    code, out, error = call("profile", *SMALL, *words)
    assert code == 2 and out == "" and message in error


@pytest.mark.parametrize("command", ["profile", "estimate"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("timm:resnet51",), "timm has no model 'resnet51'"),
        ((*SMALL, "--open", "7"), "open: "),
        ((*SMALL, "--method", "full", "--open", "0"), "open: method 'full' has no gates that could be closed"),
        ((*SMALL, "--method", "prob"), "methods: prob: method: expected one of"),
        ((*SMALL, "--method", "probe,full"), "method: expected one, got ['probe', 'full']"),
        ((*SMALL, "--method", "lora:2", "--gate-fraction", "0.5"), "gate_fraction: expected none with method 'lora:2'"),
        ((*SMALL, "--shape", "3,x"), "expected sizes such as 3,224,224, got '3,x'"),
        ((*SMALL, "--gate-fraction", "0"), "expected a number in (0, 1], got '0'"),
        ((*SMALL, "--batch", "0"), "expected an int >= 1, got '0'"),
        ((*SMALL, "--task", "nothing.taps"), "nothing.taps"),
        ((*SMALL, "--method", "probe", "--gate-fraction", "0.5"), "gate_fraction: expected none with method 'probe'"),
        ((*SMALL, "--task", "x.taps", "--method", "full"), "method: expected none beside a task file"),
        (("timm:resnet18", "--weights", "nothing.safetensors"), "nothing.safetensors"),
        (
            ("python:test_cli_costs.small", "--shape", "1,16,16"),
            "inputs: the model cannot run on tensors of shape [[8, 1",
        ),
    ],
)
def test_mistakes_are_one_line(call, command, words, message) -> None:
    code, out, error = call(command, *words)
    assert code == 2 and out == "" and message in error and len(error.splitlines()) == 1
