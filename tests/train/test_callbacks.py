"""What callbacks are told, when, and what they can ask for."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import random
import signal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_joint import config as joint_config
from test_joint import model_of, same, values
from test_joint import tasks as joint_tasks
from test_trainer import build, data, equal, tensors

from taps_ext import ConfigError, FullConfig, TapsConfig
from taps_ext.train import Callback, Task, TrainConfig, Trainer, TrainingInterrupted


class Noting(Callback):
    """Everything that is told; draws random numbers, which are not the run's."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.heard: list[tuple] = []
        self.stop_after = stop_after

    def note(self, *what) -> None:
        torch.rand(3), np.random.rand(3), random.random()
        self.heard.append(what)

    def on_start(self, run) -> None:
        self.note("start", run.name, run.tasks, run.epoch, run.steps)

    def on_step(self, run, step, values) -> None:
        self.note("step", step, dict(values))

    def on_epoch(self, run, values):
        self.note("epoch", values["epoch"], values)
        return self.stop_after is not None and values["epoch"] >= self.stop_after

    def on_end(self, run, results) -> None:
        self.note("end", dict(results))

    def kinds(self) -> list[str]:
        return [what[0] for what in self.heard]


def trainer(model, *callbacks, out=None, **settings) -> Trainer:
    config = TrainConfig(
        **{"epochs": 4, "batch_size": 16, "lr": 0.05, **settings}, out=None if out is None else str(out)
    )
    return Trainer(model, {"t": Task(train=data(), test=data(48, 1))}, config, quiet=True, callbacks=callbacks)


def test_a_run_is_told_and_not_changed(tmp_path) -> None:
    plain, told = build(dropout=0.3), build(dropout=0.3)
    noting = Noting()
    want = trainer(plain).fit()["t"]
    found = trainer(told, noting, out=tmp_path).fit()
    assert equal(tensors(plain), tensors(told)) and found["t"].history == want.history
    assert noting.kinds() == ["start", *(["step"] * 6 + ["epoch"]) * 4, "end"]
    assert noting.heard[0] == ("start", "t", ("t",), 0, 24) and noting.heard[-1] == ("end", found)
    steps = [what for what in noting.heard if what[0] == "step"]
    assert [what[1] for what in steps] == list(range(1, 25))
    assert steps[0][2].keys() == {"loss", "lr/delta", "lr/score", "lr/norm", "lr/head"}
    assert steps[0][2]["lr/delta"] == 0.05 and steps[-1][2]["lr/delta"] < 1e-3
    epochs = [what[2] for what in noting.heard if what[0] == "epoch"]
    assert epochs == want.history
    mean = sum(what[2]["loss"] for what in steps[:5]) * 16 + steps[5][2]["loss"] * 8  # 88 samples
    assert epochs[0]["loss"] == pytest.approx(mean / 88, rel=1e-12)
    again = Noting()
    trainer(build(dropout=0.3), again, out=tmp_path).fit()  # callbacks are not part of the settings
    assert again.heard == []  # and a finished task is no run


def test_a_callback_may_ask_to_stop(tmp_path) -> None:
    """The run ends as after its last epoch: the best is kept, the task is finished, and stays so."""
    short = trainer(build(FullConfig()), Noting(stop_after=1), out=tmp_path).fit()["t"]
    assert len(short.history) == 2 and short.test and (tmp_path / "t.taps").exists()
    assert not (tmp_path / "t.state").exists()
    assert trainer(build(FullConfig()), out=tmp_path).fit()["t"] == short


def test_all_are_told_and_none_writes_what_is_recorded() -> None:
    class Stopping(Callback):
        def on_epoch(self, run, values):
            values.clear()
            return True

    noting = Noting()
    history = trainer(build(FullConfig()), Stopping(), noting).fit()["t"].history
    assert noting.kinds()[-2:] == ["epoch", "end"] and noting.heard[-2][2] == history[0] and history[0]["loss"] > 0


def test_a_stop_is_kept_in_the_state(tmp_path, monkeypatch) -> None:
    def killed(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(Trainer, "_finish", killed)
    with pytest.raises(RuntimeError, match="killed"):
        trainer(build(), Noting(stop_after=1), out=tmp_path).fit()
    monkeypatch.undo()
    assert len(trainer(build(), out=tmp_path).fit()["t"].history) == 2


def test_the_end_is_told_whatever_it_is(tmp_path) -> None:
    class Stopping(Noting):
        def on_step(self, run, step, values) -> None:
            super().on_step(run, step, values)
            if step == 8:
                os.kill(os.getpid(), signal.SIGINT)

    class Failing(Noting):
        def on_epoch(self, run, values):
            raise OSError("no disk")

    noting = Stopping()
    with pytest.raises(TrainingInterrupted):
        trainer(build(), noting, out=tmp_path).fit()
    assert noting.heard[-1] == ("end", {})
    rest = Noting()
    trainer(build(), rest, out=tmp_path).fit()
    assert rest.heard[0] == ("start", "t", ("t",), 1, 24) and rest.heard[1][1] == 9
    failing = Failing()
    with pytest.raises(OSError, match="no disk"):
        trainer(build(), failing).fit()
    assert failing.heard[-1] == ("end", {})


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_a_start_that_fails_leaves_nothing_open(mode: str, tmp_path, monkeypatch) -> None:
    from taps_ext.train import log

    opened: list[Path] = []
    monkeypatch.setattr(log, "cut_torn_line", opened.append)

    class Failing(Callback):
        def on_start(self, run) -> None:
            raise OSError("no disk")

    model = model_of("ab", None if mode == "joint" else TapsConfig(lam=0.1))
    made = Trainer(model, joint_tasks(), joint_config(tmp_path), quiet=True, callbacks=[Failing()])
    with pytest.raises(OSError, match="no disk"):
        made.fit(mode)
    assert not opened  # else the file, and the line on the terminal, would stay
    made.callbacks = ()
    made.fit(mode)
    assert opened


def test_joint_and_lean_runs_are_told() -> None:
    plain, told, noting = model_of(), model_of(), Noting()
    Trainer(plain, joint_tasks(), joint_config(), quiet=True).fit("joint")
    found = Trainer(told, joint_tasks(), joint_config(), quiet=True, callbacks=[noting]).fit("joint")
    assert same(values(plain), values(told))
    assert noting.kinds() == ["start", *(["step"] * 5 + ["epoch"]) * 3, "end"]
    assert noting.heard[0] == ("start", "joint", ("a", "b"), 0, 15) and noting.heard[-1] == ("end", found)
    assert {"a_loss", "b_loss"} < noting.heard[1][2].keys()
    short = Noting(stop_after=0)
    stopped = Trainer(model_of(), joint_tasks(), joint_config(), quiet=True, callbacks=[short]).fit("joint")
    assert len(stopped["a"].history) == 1
    lean = Noting()
    Trainer(model_of(), joint_tasks(), joint_config(), quiet=True, callbacks=[lean]).fit("lean")
    assert [what[1] for what in lean.heard if what[0] == "start"] == ["joint", "a", "b"]


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_steps_that_are_left_out_are_counted_and_not_told(mode: str) -> None:
    taken: list[int] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        taken.append(int(torch.is_grad_enabled()))
        return F.cross_entropy(outputs, targets) * (math.nan if taken[-1] and sum(taken) == 2 else 1.0)

    noting, split = Noting(), joint_tasks()["a"].train
    model = model_of("a", TapsConfig(lam=0.1))
    made = Trainer(
        model, {"a": Task(train=split, val=split, loss=loss)}, joint_config(), quiet=True, callbacks=[noting]
    )
    with pytest.warns(UserWarning, match="the training loss is not finite; the step was left out"):
        made.fit(mode)
    assert [what[1] for what in noting.heard if what[0] == "step"] == [1, *range(3, 16)]


def test_what_is_no_callback_is_named() -> None:
    for wrong, message in (
        ([Noting], "expected objects of taps_ext.train.Callback, got the class Noting"),
        ([print], "expected objects of taps_ext.train.Callback, got builtin_function_or_method"),
        (Noting(), "expected a list of Callback, got Noting"),
    ):
        with pytest.raises(ConfigError, match=f"callbacks: {message}"):
            Trainer(build(), {"t": Task(train=data())}, quiet=True, callbacks=wrong)


def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "callbacks.py"
    spec = importlib.util.spec_from_file_location("callbacks_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_csv_has_a_line_for_each_epoch(tmp_path) -> None:
    file = tmp_path / "epochs.csv"
    result = trainer(build(), example().CsvFile(file), example().GoodEnough("val_accuracy", 2.0)).fit()["t"]
    header, *lines = list(csv.reader(file.open(newline="")))
    assert header == ["run", *result.history[0]] and len(lines) == 4
    assert [float(line[header.index("loss")]) for line in lines] == [entry["loss"] for entry in result.history]


def test_the_examples_trackers_call_what_they_track_with(tmp_path, monkeypatch) -> None:
    """Against stand-ins of their modules, which are not installed here."""
    calls: list[tuple] = []

    def noting(name: str):
        return lambda *args, **named: calls.append((name, args, named))

    run = SimpleNamespace(
        id="x1", log=noting("log"), finish=noting("finish"), summary=SimpleNamespace(update=noting("s"))
    )
    wandb = ModuleType("wandb")
    wandb.init = lambda **named: calls.append(("init", (), named)) or run
    mlflow = ModuleType("mlflow")
    for name in ("set_experiment", "start_run", "log_dict", "log_metrics", "log_artifact", "end_run"):
        setattr(mlflow, name, noting(name))
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    monkeypatch.setitem(__import__("sys").modules, "mlflow", mlflow)
    trainer(build(), example().Wandb("p"), example().MLflow("e"), out=tmp_path).fit()
    names = [call[0] for call in calls]
    assert names.count("init") == names.count("start_run") == names.count("finish") == names.count("end_run") == 1
    assert names.count("log") == 24 + 4 and names.count("log_metrics") == 4 + 1
    assert [call[1] for call in calls if call[0] == "log_artifact"] == [(str(tmp_path / "t.taps"),)]
    assert (tmp_path / "t.wandb").read_text() == "x1"
