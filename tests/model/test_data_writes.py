"""Scores written through `.data`, as some optimizers do: what ran is what a report, a file and a merged copy say."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import TinyNet, images, settle

from taps_ext import GateError, TapsConfig, TaskModel
from taps_ext.files.checkpoint import same_bits


class Descent(torch.optim.Optimizer):
    """Steps past autograd and version counters, or as torch's own do."""

    def __init__(self, params, *, past: bool) -> None:
        super().__init__(params, {})
        self.past = past

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (p.data if self.past else p).add_(p.grad, alpha=-group["lr"])


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return settle(TinyNet())


def adapted(gates: str = "host") -> TaskModel:
    """Two layers close within thirty steps, one stays open, one is closed from the start."""
    model = TaskModel(base(), TapsConfig(lam=1.0), gates=gates)
    model.add_task("t", num_classes=2)
    with torch.no_grad():
        model.state("t").table["hidden"].gate.score.fill_(2.0)
        model.state("t").table["conv2"].gate.score.fill_(0.05)
    return model


def train(model: TaskModel, *, past: bool) -> None:
    torch.manual_seed(1)
    optimizer = Descent(model.parameter_groups("t", lr=0.02), past=past)
    x, y = images(6), torch.tensor([0, 1] * 3)
    model.train()
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x, task="t"), y) + model.sparsity_loss("t")
        optimizer.zero_grad()
        loss.backward()
        model.drop_closed_gradients("t")
        optimizer.step()


def agreed(model: TaskModel, tmp_path) -> list[str]:
    """The layers that are open, by the scores, the report, the file, the merged weights and what runs."""
    x = images()
    model.save_task("t", tmp_path / "t.taps")
    told = [row.layer for row in model.report("t").rows if row.open]
    assert told == [name for name, _, gate in model.state("t").gated() if gate.score.item() >= gate.threshold]
    fresh = TaskModel(base()).eval()
    fresh.load_task(tmp_path / "t.taps")
    assert told == [row.layer for row in fresh.report("t").rows if row.open]
    model.eval()
    with torch.no_grad():
        want = fresh(x, task="t")
        assert model.gates == "device" or same_bits(model(x, task="t"), want)
        poisoned = copy.deepcopy(model)
        for name, part, _ in poisoned.state("t").gated():
            part.change.delta.add_(0.0 if name in told else float("nan"))  # which no closed layer reads
        assert same_bits(poisoned(x, task="t"), model(x, task="t"))
        assert same_bits(copy.deepcopy(model).merge_and_unload("t")(x), want)
        model.merge_task("t")
        assert same_bits(model(x, task="t"), want)
        model.unmerge_task()
    return told


@pytest.mark.parametrize("gates", ["host", "device"])
def test_thirty_steps(gates: str, tmp_path) -> None:
    """The same as with an ordinary optimizer, bit for bit: gates were followed at every step."""
    model, other = adapted(gates), adapted(gates)
    train(model, past=True)
    train(other, past=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert agreed(model, tmp_path) == agreed(other, tmp_path) == ["hidden"]


def test_thirty_steps_where_values_are_dear(tmp_path, monkeypatch) -> None:
    """On a GPU forwards go by versions, which such writes leave alone: saving takes the scores' gates and says once
    that others ran. What is written, told, merged and run from then on is one. The values are read on the CPU here."""
    model = adapted()
    state = model.state("t")
    monkeypatch.setattr(state, "_following", lambda: (state.learned(), False))
    train(model, past=True)
    assert [name for name, _, gate in state.gated() if gate.known] == ["conv1", "depthwise", "hidden"]
    with pytest.warns(UserWarning, match="conv1: its score was written in a way that leaves no trace"):
        model.save_task("t", tmp_path / "t.taps")
    assert [name for name, _, gate in state.gated() if gate.known] == ["hidden"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agreed(model, tmp_path) == ["hidden"]


@pytest.mark.parametrize("road", ["host", "dear", "device"])
def test_a_score_written_while_its_task_is_merged_is_refused(road: str, tmp_path, monkeypatch) -> None:
    """Its gate from before runs, so that none other is told."""
    model = adapted("device" if road == "device" else "host").eval()
    state, x = model.state("t"), images()
    if road == "dear":
        monkeypatch.setattr(state, "_following", lambda: (state.learned(), False))
    with torch.no_grad():
        state.table["hidden"].change.delta.normal_()
        model.merge_task("t")
        merged = model(x, task="t")
        state.table["hidden"].gate.score.data.zero_()
        tellers = [lambda: model.report("t"), lambda: model.save_task("t", tmp_path / "t.taps")]
        for _ in range(2):
            for tell in [*tellers, *([lambda: model(x, task="t")] if road == "host" else [])]:
                with pytest.raises(GateError, match="hidden: its score was written while its task is merged"):
                    tell()
        assert road == "host" or same_bits(model(x, task="t"), merged)
        model.unmerge_task()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert agreed(model, tmp_path) == ["conv1", "depthwise"]
