"""What is on disk when a run stops, is killed or ends, and what comes back from it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_joint import config as joint_config
from test_joint import model_of, same, tasks, values
from test_trainer import build, data, equal, fit, tensors

from taps_ext import ConfigError, TapsConfig, TaskModel
from taps_ext.cli.config import load_config
from taps_ext.store import TaskFileError
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.run import Run

MODES = ("incremental", "joint", "lean")


def watch_the_disk(monkeypatch) -> list[tuple[str, str]]:
    """What happens to files from here on, in order: "write" (a rename into place), "sync" (of a folder), "unlink"."""
    events: list[tuple[str, str]] = []
    replace, unlink, fsync = os.replace, os.unlink, os.fsync

    def told(kind: str, call):
        def inner(*args, **kwargs):
            found = call(*args, **kwargs)
            events.append((kind, os.path.basename(os.fspath(args[-1]))))
            return found

        return inner

    def synced(fd: int) -> None:
        fsync(fd)
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))

    monkeypatch.setattr(os, "replace", told("write", replace))
    monkeypatch.setattr(os, "unlink", told("unlink", unlink))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: os.path.exists(path) and os.unlink(path))
    monkeypatch.setattr(os, "fsync", synced)
    return events


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of descriptors are read in /proc")
@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_a_state_goes_when_the_results_are_durable(mode: str, tmp_path, monkeypatch) -> None:
    """Each file is synced under its temporary name, renamed, and its folder synced, before the state is removed."""
    if mode == "joint":
        model, jobs, state = model_of(), tasks(), "%joint.state"
        files = ["joint-taps.shared.taps", "a.taps", "a.result.json", "b.taps", "b.result.json"]
    else:
        model, jobs, state = build(), {"t": Task(train=data())}, "t.state"
        files = ["t.taps", "t.result.json"]
    events = watch_the_disk(monkeypatch)
    Trainer(model, jobs, joint_config(tmp_path), quiet=True).fit(mode)
    gone = events.index(("unlink", state))
    for name in files:
        at = events.index(("write", name))
        assert events[at - 1][0] == "sync" and events[at - 1][1].endswith(".tmp")
        assert events[at + 1] == ("sync", tmp_path.name) and at + 1 < gone


@pytest.mark.parametrize("kind", ["cut", "folder"])
@pytest.mark.parametrize("which", ["task", "shared"])
def test_a_damaged_file_of_a_finished_run_says_how_to_go_on(which: str, kind: str, tmp_path) -> None:
    if which == "task":
        fit(build(), out=str(tmp_path))
        file = tmp_path / "t.taps"
    else:
        Trainer(model_of(), tasks(), joint_config(tmp_path), quiet=True).fit("joint")
        file = tmp_path / "joint-taps.shared.taps"
    content = file.read_bytes()
    file.unlink()
    if kind == "cut":
        file.write_bytes(content[:-1])
    else:
        file.mkdir()
    with pytest.raises(TaskFileError, match=rf"{file.name}: .*; delete it, or use resume=False \(--restart\)"):
        if which == "task":
            fit(build(), out=str(tmp_path))
        else:
            Trainer(model_of(), tasks(), joint_config(tmp_path), quiet=True).fit("joint")


def test_a_finished_task_comes_back_as_it_was(tmp_path, monkeypatch) -> None:
    """A run of two tasks, killed in the second: the first one, some of whose layers are closed, is what it would be."""

    def two() -> tuple[TaskModel, dict[str, Task]]:
        model = build(TapsConfig(lam=0.5))
        torch.manual_seed(1)
        model.add_task("u", num_classes=4)
        return model, {"t": Task(train=data()), "u": Task(train=data(seed=3))}

    def settings(folder: str) -> TrainConfig:
        return TrainConfig(epochs=4, batch_size=16, lr=0.01, warmup_epochs=1, budget=0.5, out=str(tmp_path / folder))

    whole, jobs = two()
    Trainer(whole, jobs, settings("whole"), quiet=True).fit()
    run = Run.train_epoch

    def killed(self, *args):
        if self.name == "u" and self.progress.epoch == 2:
            raise RuntimeError("killed")
        return run(self, *args)

    monkeypatch.setattr(Run, "train_epoch", killed)
    with pytest.raises(RuntimeError, match="killed"):
        Trainer(*two(), settings("parts"), quiet=True).fit()
    monkeypatch.setattr(Run, "train_epoch", run)
    parts, jobs = two()
    Trainer(parts, jobs, settings("parts"), quiet=True).fit()

    report = whole.report("t")
    assert 0 < report.layers_open < len(report.rows)  # some have closed
    assert report.to_json() == parts.report("t").to_json()
    x = data(32, 5)[0]
    with torch.no_grad():
        for name in ("t", "u"):
            assert torch.equal(whole.eval()(x, task=name), parts.eval()(x, task=name))
            files = [tmp_path / folder / f"{name}.taps" for folder in ("whole", "parts")]
            assert files[0].read_bytes() == files[1].read_bytes()
            for model, folder in ((whole, "whole"), (parts, "parts")):
                model.save_task(name, tmp_path / folder / "again.taps")
            files = [tmp_path / folder / "again.taps" for folder in ("whole", "parts")]
            assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("mode", MODES)
def test_signals_save_and_the_run_goes_on_bit_equal(mode: str, number: int, tmp_path) -> None:
    config = joint_config(tmp_path / "parts", epochs=2)
    taken: list[int] = []
    at = {4, 25 if mode == "lean" else 12}  # of 16 batches, 20, or 20 that share and 16 of their own

    def noting(outputs, targets):
        taken.append(int(torch.is_grad_enabled()))  # a validation is no step
        if sum(taken) in at and taken[-1]:
            os.kill(os.getpid(), number)
        return F.cross_entropy(outputs, targets)

    def jobs(loss) -> dict[str, Task]:
        return {name: Task(train=t.train, val=t.val, loss=loss, metrics=t.metrics) for name, t in tasks().items()}

    method = TapsConfig(lam=0.1) if mode == "incremental" else None
    whole, stops = model_of(config=method), 0
    Trainer(whole, jobs(F.cross_entropy), joint_config(epochs=2), quiet=True).fit(mode)
    while True:
        model = model_of(config=method)
        try:
            Trainer(model, jobs(noting), config, quiet=True).fit(mode)
            break
        except TrainingInterrupted:
            stops += 1
            assert list((tmp_path / "parts").glob("*.state"))
    assert stops == 2 and not list((tmp_path / "parts").glob("*.state"))
    assert report_of(model) == report_of(whole)
    if mode == "joint":
        assert same(values(whole), values(model))


def report_of(model: TaskModel) -> list[tuple]:
    """What the tasks compute and what is open."""
    with torch.no_grad():
        return [(model.eval()(tasks()[n].train[0], task=n).tolist(), model.report(n).to_json()) for n in "ab"]


def test_states_are_written_within_an_epoch(tmp_path, monkeypatch) -> None:
    """Killed in the middle of an epoch, without a word, a run goes on where the last state was, bit-equal."""
    whole = build(dropout=0.3)
    want = fit(whole, accumulate=2)
    steps = Run._gradients
    count: list[int] = []

    def killed(run, chunk):
        count.append(1)
        if len(count) == 6:  # three steps an epoch: the third of the second
            raise RuntimeError("killed")
        return steps(run, chunk)

    monkeypatch.setattr(Run, "_gradients", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(build(dropout=0.3), accumulate=2, out=str(tmp_path), save_every=0.0)
    model = build(dropout=0.3)
    found = fit(model, accumulate=2, out=str(tmp_path), save_every=0.0)
    assert len(count) == 6 + 12 - 5  # five steps were kept
    assert equal(tensors(whole), tensors(model)) and found.history == want.history


def test_a_joint_state_is_written_within_an_epoch(tmp_path, monkeypatch) -> None:
    from taps_ext.train.joint import JointRun

    whole = model_of()
    Trainer(whole, tasks(), joint_config(), quiet=True).fit("joint")
    step, count = JointRun._step, []

    def killed(run, *args):
        count.append(1)
        if len(count) == 8:  # five steps an epoch
            raise RuntimeError("killed")
        step(run, *args)

    monkeypatch.setattr(JointRun, "_step", killed)
    settings = joint_config(tmp_path, save_every=0.0)
    with pytest.raises(RuntimeError, match="killed"):
        Trainer(model_of(), tasks(), settings, quiet=True).fit("joint")
    model = model_of()
    Trainer(model, tasks(), settings, quiet=True).fit("joint")
    assert len(count) == 8 + 15 - 7 and same(values(whole), values(model))


@pytest.mark.parametrize("what", ["state", "optimizer"])
def test_a_lean_run_that_does_not_begin_leaves_what_is_trained_later(what: str, tmp_path) -> None:
    """A state of other settings, an optimizer that cannot be made: gates are trained all the same in the next run."""

    def fail(groups):
        raise ValueError("no such thing")

    whole, model = model_of(), model_of()
    Trainer(whole, tasks(), joint_config(tmp_path / "whole"), quiet=True).fit("lean")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "%joint.state").write_bytes(b"damaged")
    settings = joint_config(tmp_path / "one")
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    made = Trainer(model, tasks(), settings, quiet=True, optimizer=fail if what == "optimizer" else None)
    with pytest.raises((ConfigError, TaskFileError)):
        made.fit("lean")
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    Trainer(model, tasks(), settings, quiet=True).fit("lean", resume=False)
    assert same(values(whole), values(model))


def test_a_restart_that_is_killed_does_not_go_on_with_what_it_replaced(tmp_path, monkeypatch) -> None:
    fit(build(), out=str(tmp_path))
    (tmp_path / "t.state").write_bytes(b"of another run")
    monkeypatch.setattr(Run, "train_epoch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(build(), resume=False, out=str(tmp_path))
    assert not (tmp_path / "t.state").exists() and not (tmp_path / "t.result.json").exists()


def test_when_a_state_is_saved_is_said(tmp_path, capsys) -> None:
    def say(**settings) -> str:
        config = TrainConfig(epochs=1, batch_size=16, warmup_epochs=0, **settings)
        Trainer(build(), {"t": Task(train=data())}, config).fit()
        return capsys.readouterr().err

    said = say(out=str(tmp_path), save_every=90.0)
    assert said.count(f"t: state saved every 90 s in {tmp_path / 't.state'}; Ctrl-C saves") == 1
    assert "state saved" not in say()
    assert load_config(None, ["train.save_every=5"]).training().save_every == 5
    with pytest.raises(ConfigError, match="save_every: expected a number"):
        load_config(None, ["train.save_every=-1"]).training()
