"""What stays open within a budget: the largest scores that fit, and scores that say so."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from taps_ext import TapsConfig, TaskModel
from taps_ext.train.budget import chosen, settle

SIZES = (3, 17, 64, 5, 40)  # outputs of the layers, of 8 inputs each


def build(scores, gates: str = "host", threshold: float = 0.1, **overrides) -> TaskModel:
    base = nn.Sequential(*(nn.Linear(8, size, bias=False) for size in SIZES), nn.Linear(8, 2))
    model = TaskModel(base, TapsConfig(lam=0.5, threshold=threshold, overrides=overrides), gates=gates)
    model.add_task("t")
    with torch.no_grad():
        for (_, part), score in zip(model.state("t").gated(), scores, strict=True):
            if part.learn:
                part.score.fill_(score)
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
    model = build(scores, gates, threshold)
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
    model = build([1.0, 1.0, 0.2, 0.3, 0.4], **fixed)
    total = sum(SIZES)
    report = model.report("t")
    assert chosen(report, (17 + 40 + 5) / total) == {"4", "3"}
    assert chosen(report, (17 + 39) / total) == {"3"}
    assert chosen(report, 16 / total) == set()


def test_an_open_gate_of_equal_score_is_taken_in_module_order() -> None:
    report = build([0.5] * 5).report("t")
    assert chosen(report, (3 + 17 + 5) / sum(SIZES)) == {"0", "1", "3"}
