"""Parts that no method of ours has where somebody else's may have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_families import images, net
from torch import Tensor

from taps_ext import MethodConfig, TapsError, TaskModel, UnsupportedModuleError, register_method
from taps_ext.base.scan import Scan
from taps_ext.parts import (
    Change,
    Dense,
    Gate,
    Instead,
    Layer,
    Own,
    Part,
    change_kinds,
    register_change,
)


@register_method("somebody's")
@dataclass(frozen=True, kw_only=True)
class Somebodys(MethodConfig):
    """One part over the layer "hidden"."""

    what: str

    def parts(self, base: Scan) -> dict[str, Part]:
        host = base.gated["hidden"]
        return {"hidden": Own(host) if self.what == "own" else Instead(torch.nn.Linear(8, 8))}


@pytest.mark.parametrize("what", ["own", "instead"])
def test_a_linear_layer_of_the_tasks_own(what: str, tmp_path: Path) -> None:
    model, x = TaskModel(net(), Somebodys(what=what)), images()
    model.add_task("t", num_classes=3)
    model.train()
    model(x, task="t").square().sum().backward()
    with torch.no_grad():
        for parameter in model.state("t").table["hidden"].parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    model.eval()
    want = model(x, task="t")
    assert not torch.equal(want, TaskModel(net()).eval()(x)[:, :3])
    with torch.no_grad():
        assert torch.equal(model(x, task="t"), want)
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(net()).eval()
    fresh.load_task(tmp_path / "t.taps")
    assert torch.equal(fresh(x, task="t"), want)
    model.merge_task("t")
    assert torch.equal(model(x, task="t"), want)
    assert torch.equal(model.merge_and_unload("t")(x), want)


@register_method("somebody's-bias")
@dataclass(frozen=True, kw_only=True)
class OwnBias(MethodConfig):
    """A bias of the task's own for every layer."""

    def parts(self, base: Scan) -> dict[str, Part]:
        return {n: Layer(Gate(learn=False), Dense(h), bias=torch.zeros(len(h.weight))) for n, h in base.gated.items()}


def test_a_bias_that_the_base_has_no_place_for_is_refused() -> None:
    base = net()
    base.hidden = torch.nn.Linear(8, 8, bias=False)
    model = TaskModel(base, OwnBias())
    with pytest.raises(UnsupportedModuleError, match="hidden: expected no bias of its own"):
        model.add_task("t", num_classes=3)
    assert not model.tasks


def test_kinds_of_changes_that_could_not_be_kept_or_trained_are_refused() -> None:
    class Score(Change):
        def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
            return {"score": weight.shape}

    class Odd(Change):
        role = "factor"

    with pytest.raises(TapsError, match="Score.shapes: 'score' is the name of another tensor"):
        Score(torch.nn.Linear(2, 2))
    with pytest.raises(TapsError, match="Odd.role: expected 'delta' or 'weight', got 'factor'"):
        register_change("odd")(Odd)
    assert "odd" not in change_kinds()
