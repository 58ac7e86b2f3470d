"""What is open within a budget, and gates that rest: the largest scores that fit, chosen once and left alone."""

import itertools
import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from models import TinyNet
from models import settle as settled
from test_trainer import build, fit
from torch import nn

from taps_ext import TapsConfig, TaskModel
from taps_ext.train.budget import chosen, settle

SIZES = (3, 17, 64, 5, 40)  # outputs of the layers, of 8 inputs each


def layered(scores, gates: str = "host", threshold: float = 0.1, **overrides) -> TaskModel:
    base = nn.Sequential(*(nn.Linear(8, size, bias=False) for size in SIZES), nn.Linear(8, 2))
    model = TaskModel(
        base, TapsConfig(threshold=threshold, score_init=max(threshold, 0.15), overrides=overrides), gates=gates
    )
    model.add_task("t")
    with torch.no_grad():
        for (_, _, gate), score in zip(model.state("t").gated(), scores, strict=True):
            if gate.learn:
                gate.score.fill_(score)
    model.refresh_gates()
    return model


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=5),
    budget=st.floats(0, 1),
    gates=st.sampled_from(["host", "device"]),
    threshold=st.sampled_from([0.1, 0.3, 0.7, 1e-30]),
)
def test_settles_on_the_largest_scores_that_fit(scores, budget, gates, threshold) -> None:
    model = layered(scores, gates, threshold)
    settle(model.state("t"), model.report("t"), budget)
    report = model.report("t")
    rows = {row.layer: row for row in report.rows}
    assert report.share <= budget
    taken = 0  # by hand: in the order of the scores, each that fits
    for score, name in sorted(zip(scores, rows, strict=True), key=lambda pair: -pair[0]):
        assert rows[name].open == ((taken + rows[name].parameters) / report.gated <= budget)
        taken += rows[name].parameters * rows[name].open
        kept = (score >= threshold) == rows[name].open
        assert (rows[name].score == score) == kept or rows[name].score == pytest.approx(threshold, rel=1e-6, abs=1e-44)


def test_fixed_gates_count_first() -> None:
    fixed = {"1": {"learn": False, "open": True}, "0": {"learn": False, "open": False}}
    model = layered([1.0, 1.0, 0.2, 0.3, 0.4], **fixed)
    total = sum(SIZES)
    report = model.report("t")
    assert chosen(report, (17 + 40 + 5) / total) == {"4", "3"}
    assert chosen(report, (17 + 39) / total) == {"3"}
    assert chosen(report, 16 / total) == set()


def test_an_open_gate_of_equal_score_is_taken_in_module_order() -> None:
    report = layered([0.5] * 5).report("t")
    assert chosen(report, (3 + 17 + 5) / sum(SIZES)) == {"0", "1", "3"}


# --- in a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_budget_is_met(budget) -> None:
    model = build(TapsConfig(lam=0.5))
    result = fit(model, budget=budget, epochs=30, lr=0.03, warmup_epochs=1)
    assert result.within_budget and result.share <= budget and model.report("t").share == result.share
    assert result.test["accuracy"] > 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("lam", [1e-6, 0.5])
def test_gates_rest_from_half_time(optimizer, lam, tmp_path) -> None:
    """What fits into the budget is chosen after half of the epochs, also where no penalty ever closed a layer."""
    model = build(TapsConfig(lam=lam))
    result = fit(model, budget=0.5, epochs=9, lr=0.03, warmup_epochs=1, optimizer=optimizer, out=tmp_path)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [tuple(event["scores"].values()) for event in events if event["event"] == "epoch"]
    assert len(set(scores[4:])) == 1 and len(set(scores[:5])) == 5
    assert all(0.0 < entry["share"] <= 0.5 for entry in result.history[4:])
    losses = [entry["loss"] for entry in result.history[4:]]
    assert len(set(losses)) == len(losses)  # the rest goes on


@pytest.mark.parametrize("gates", ["host", "device"])
def test_frozen_gates_cost_nothing(gates, tmp_path) -> None:
    """After two epochs no score moves, closed layers keep no input, and in the end scores are learned again."""
    torch.manual_seed(0)
    model = TaskModel(settled(TinyNet()), TapsConfig(lam=2.0), gates=gates)
    model.add_task("t", num_classes=4)
    kept, asked = [], []
    inputs = {}
    hook = model.base.hidden.register_forward_pre_hook(lambda module, args: inputs.update(hidden=args[0]))

    def pack(tensor):
        asked[-1] += "hidden" in inputs and inputs["hidden"].data_ptr() == tensor.data_ptr()
        return tensor

    def loss(outputs, targets):
        if torch.is_grad_enabled():
            kept.append({n: p.gate.score.requires_grad for n, p, _ in model.state("t").learned()})
        return torch.nn.functional.cross_entropy(outputs, targets)

    inner = model.forward

    def counted(*args, **kwargs):
        if torch.is_grad_enabled():
            asked.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return inner(*args, **kwargs)

    model.forward = counted
    result = fit(
        model, epochs=5, warmup_epochs=0, freeze_after=2, lr=0.1, select="last", out=tmp_path, task={"loss": loss}
    )
    hook.remove()
    del model.forward
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [tuple(event["scores"].values()) for event in events if event["event"] == "epoch"]
    assert len(set(scores[1:])) == 1 and scores[0] != scores[1]
    assert len({entry["loss"] for entry in result.history}) == 5
    assert set(kept[0].values()) == {True} and set(kept[-1].values()) == {False}
    assert all(p.gate.score.requires_grad and p.gate.score.grad is None for _, p, _ in model.state("t").learned())
    if gates == "host":
        closed = not model.state("t").table["hidden"].gate.known
        assert closed and asked[0] == 1 and asked[-1] == 0


def test_reopened_gates_are_counted() -> None:
    """A score that every step pushes across its threshold and back."""
    model = build(TapsConfig(lam=0.0))
    part = model.state("t").table["conv2"]
    steps = []

    def push(grad):
        steps.append(part.gate.known)
        return torch.full_like(grad, 0.1 if part.gate.known else -0.1)

    part.gate.score.register_hook(push)
    once = {"lr": 1e-9, "score_lr": 1.0, "momentum": 0.0, "schedule": "constant", "select": "last"}
    result = fit(model, epochs=3, **once)
    expected = sum(now and not before for before, now in itertools.pairwise(steps))
    assert expected > 5
    others = [0 for name, _, gate in model.state("t").learned() if name != "conv2" and not gate.known]
    assert sum(entry["reopened"] for entry in result.history) == expected and not others


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (1, 2), (3, 2), (4, 9)])
def test_a_short_run_meets_its_budget(epochs, warmup) -> None:
    result = fit(build(), budget=0.3, epochs=epochs, warmup_epochs=warmup)
    assert result.within_budget and 0.0 < result.share <= 0.3


def test_patience_waits_until_the_budget_is_met() -> None:
    result = fit(build(TapsConfig(lam=1e-6)), budget=0.3, epochs=12, warmup_epochs=0, patience=1, lr=1e-9)
    assert result.within_budget and 6 <= len(result.history) <= 8


def test_an_unreachable_budget_is_said() -> None:
    model = build(TapsConfig(lam=1e-6, overrides={"conv1": {"learn": False, "open": True}}))
    with pytest.warns(UserWarning, match="no epoch met the budget"):
        assert not fit(model, budget=0.0, epochs=2).within_budget
