"""Pictures and TensorBoard events of a run: written, with the run's numbers in them."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer import build, fit

from taps_ext import ConfigError
from taps_ext.plot import Point, curves, gates, tradeoff
from taps_ext.plot.curves import _metric, read_epochs
from taps_ext.plot.tradeoff import front
from taps_ext.train import TrainConfig

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = fit(build(), out=str(out), tensorboard=True)
    return out, result


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_curves_and_gates(run, tmp_path) -> None:
    out, result = run
    epochs = read_epochs(out / "metrics.jsonl")
    assert [e["val_accuracy"] for e in epochs["t"]] == [h["val_accuracy"] for h in result.history]
    curves(tmp_path / "curves.png", out / "metrics.jsonl")
    gates(tmp_path / "gates.png", out / "metrics.jsonl")
    assert is_png(tmp_path / "curves.png") and is_png(tmp_path / "gates.png")
    with pytest.raises(ConfigError, match=r"task: expected one of \['t'\], got 'u'"):
        gates(tmp_path / "gates.png", out / "metrics.jsonl", "u")


def test_a_shorter_run_in_the_same_folder_replaces_the_longer(tmp_path) -> None:
    """In the file, whose torn last line is cut off, and in TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(build(), out=str(tmp_path), epochs=4, tensorboard=True)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"event": "ep')
    result = fit(build(), resume=False, out=str(tmp_path), epochs=2, tensorboard=True)
    assert [e["loss"] for e in read_epochs(file)["t"]] == [h["loss"] for h in result.history]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "t"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [0, 1]


def test_each_task_has_its_own_metric(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    entries = [
        {"event": "epoch", "task": "a", "epoch": 0, "loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5, "share": 1.0},
        {"event": "epoch", "task": "b", "epoch": 0, "loss": 1.0, "val_loss": 1.0, "val_error": 0.2, "share": 1.0},
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [_metric(epochs[0]) for epochs in read_epochs(file).values()] == ["val_accuracy", "val_error"]
    curves(tmp_path / "curves.png", file)
    assert is_png(tmp_path / "curves.png")


def test_tradeoff(tmp_path) -> None:
    points = [Point("TAPS", 40.0, 97.0, 0.5), Point("probe", 1.0, 80.0), Point("late", 2.0, 99.0, converged=False)]
    tradeoff(tmp_path / "t.png", {"signs": points, "digits": points[:1], "none": []})
    assert is_png(tmp_path / "t.png")
    with pytest.raises(ConfigError, match="panels: expected at least one point"):
        tradeoff(tmp_path / "t.png", {"signs": []})
    with pytest.raises(ConfigError, match="panels: expected sizes above 0, got 0 of 'free'"):
        tradeoff(tmp_path / "t.png", {"signs": [Point("free", 0, 50.0)]})


def test_the_front() -> None:
    """No other converged point is as small and better; of equal sizes the better one."""
    points = [Point("a", 1, 50.0), Point("b", 1, 60.0), Point("c", 2, 55.0), Point("d", 3, 70.0), Point("e", 4, 70.0)]
    assert [p.method for p in front([*points, Point("f", 1, 99.0, converged=False)])] == ["b", "d"]


def test_a_restarted_run_and_a_torn_line(tmp_path) -> None:
    def line(epoch: int, loss: float) -> str:
        return json.dumps({"event": "epoch", "task": "t", "epoch": epoch, "loss": loss}) + "\n"

    file = tmp_path / "metrics.jsonl"
    file.write_text(line(0, 3.0) + line(1, 2.0) + line(0, 2.5) + '{"event": "ep')
    assert [(e["epoch"], e["loss"]) for e in read_epochs(file)["t"]] == [(0, 2.5), (1, 2.0)]
    start = json.dumps({"event": "start", "task": "t", "epoch": 1}) + "\n"
    file.write_text(line(0, 3.0) + line(1, 2.0) + line(2, 1.0) + start + line(1, 1.5))
    assert [(e["epoch"], e["loss"]) for e in read_epochs(file)["t"]] == [(0, 3.0), (1, 1.5)]
    file.write_text("nonsense\n" + line(0, 1.0))
    with pytest.raises(ConfigError, match="expected a JSON event in line 1, got 'nonsense"):
        read_epochs(file)
    file.write_text("")
    with pytest.raises(ConfigError, match="expected epochs in .*, got none"):
        read_epochs(file)


def test_tensorboard_has_the_epochs(run) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, result = run
    events = accumulator.EventAccumulator(str(out / "tensorboard" / "t"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"loss", "val_accuracy", "share", "layers_open", "scores/conv1"} <= set(tags)
    got = [event.value for event in events.Scalars("val_accuracy")]
    want = torch.tensor([h["val_accuracy"] for h in result.history], dtype=torch.float32)
    assert torch.equal(torch.tensor(got), want)
    with pytest.raises(ConfigError, match="tensorboard: expected out to name"):
        TrainConfig(tensorboard=True)
