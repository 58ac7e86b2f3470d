"""Families: what tasks have together stays what its file holds, and is never left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from taps_ext import MethodConfig, TapsError, TaskModel, register_method
from taps_ext.base.scan import Scan
from taps_ext.parts import Dense, Gate, Layer, Part


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).mean((2, 3)))))


@register_method("family-with-norms")
@dataclass(frozen=True, kw_only=True)
class WithNorms(MethodConfig):
    """Deltas and norms that tasks share, Deltas of their own above."""

    def parts(self, base: Scan) -> dict[str, Part]:
        return {name: Layer(Gate(), Dense(host)) for name, host in base.gated.items()}

    def shared(self, base: Scan) -> dict[str, Part]:
        layers = {name: Layer(Gate(learn=False), Dense(host)) for name, host in base.gated.items()}
        return {**layers, **base.own(base.norms)}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images() -> Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def two_tasks() -> TaskModel:
    model = TaskModel(net(), WithNorms())
    for name in ("a", "b"):
        model.add_task(name, num_classes=3)
    return model


@pytest.mark.parametrize("loaded", [False, True])
def test_batches_do_not_move_the_norms_of_a_saved_family(loaded: bool, tmp_path: Path) -> None:
    model, x = two_tasks(), images()
    model.train()
    model(x, task="a")  # while it is in no file they do
    family = model.families["family-with-norms"]
    assert not torch.equal(family.table["norm"].running_mean, model.base.norm.running_mean)
    model.save_shared(family.name, tmp_path / "family.taps")
    for name in model.tasks:
        model.save_task(name, tmp_path / f"{name}.taps")
    if loaded:
        model = TaskModel(net())
        for name in ("a", "b"):
            model.load_task(tmp_path / f"{name}.taps")
    model.eval()
    before = model(x, task="a")
    model.train()
    for _ in range(3):
        model(x + 5.0, task="b").sum().backward()
    model.eval()
    assert torch.equal(model(x, task="a"), before)
    model.save_task("b", tmp_path / "b.taps")


def test_no_task_is_loaded_over_a_family_that_has_changed(tmp_path: Path) -> None:
    model = two_tasks()
    model.save_shared("family-with-norms", tmp_path / "family.taps")
    model.save_task("a", tmp_path / "a.taps")
    with torch.no_grad():
        next(model.families["family-with-norms"].parameters()).add_(1.0)
    with pytest.raises(TapsError, match="load_task: the family .* has changed"):
        model.load_task(tmp_path / "a.taps", "again")
    assert model.tasks == ["a", "b"]
