"""Records that no model of ours has written: refused by name, whatever they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taps_ext import LoraConfig, MethodConfig, TaskFileError, TaskModel, store
from taps_ext.store.record import Record

FIXED = {"learn": False, "open": True, "threshold": 0.1}
DELTA = {"delta": torch.ones(8, 8)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.act, self.fc = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.hidden(x)))


def model() -> TaskModel:
    torch.manual_seed(0)
    return TaskModel(Net()).eval()


def task_file(module: str, facts: dict[str, Any], tensors: dict[str, Tensor], **extra: str) -> store.TaskFile:
    spec = {"type": "linear", "in": 8, "out": 3, "bias": False}
    head = Record({"kind": "instead", "module": spec}, {"weight": torch.zeros(3, 8)})
    parts = {"fc": head, module: Record(facts, tensors)}
    return store.TaskFile(
        method={"method": "nobody's"}, parent=model().fingerprint(), name="t", parts=parts, extra=extra
    )


def layer(**facts: Any) -> dict[str, Any]:
    return {"kind": "layer", "gate": FIXED, "change": {"kind": "dense"}, **facts}


def test_a_good_one(tmp_path: Path) -> None:
    file = task_file("hidden", layer(), DELTA)
    fresh, x = model(), torch.randn(2, 8)
    for name in ("one", "two"):
        assert fresh.load_task(file, name) == name
    assert torch.equal(fresh(x, task="one"), fresh(x, task="two"))
    assert not file.parts["hidden"].taken


@pytest.mark.parametrize(
    ("module", "facts", "tensors", "message"),
    [
        ("hidden", layer(change={"kind": ["dense"]}), DELTA, r"change: expected one of .* got \['dense'\]"),
        ("hidden", layer(change={}), DELTA, "change: expected one of"),
        ("hidden", layer(gate={**FIXED, "threshold": 1e-60}), DELTA, "threshold: expected a float32 above 0"),
        ("hidden", layer(gate={**FIXED, "threshold": 1e300}), DELTA, "threshold: expected a float32 above 0"),
        ("act", layer(), DELTA, "expected a module with a weight, got a ReLU"),
        ("", layer(gate={**FIXED, "open": False}), {}, "expected a module with a weight, got a Net"),
    ],
)
def test_refused(module: str, facts: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path, fresh = tmp_path / "t.taps", model()
    store.save(path, task_file(module, facts, tensors))
    for allow_dtype_cast in (False, True):
        with pytest.raises(TaskFileError, match=message):
            fresh.load_task(path, allow_dtype_cast=allow_dtype_cast)
    assert not fresh.tasks


def test_notes_nested_without_end(tmp_path: Path) -> None:
    file = task_file("hidden", layer(), DELTA, training_only="[" * 200_000)
    with pytest.raises(TaskFileError, match="training_only: expected a JSON list"):
        model().load_task(file)


@pytest.mark.parametrize(
    ("config", "facts", "tensors", "message"),
    [
        (
            LoraConfig(rank=2),
            layer(change={"kind": "whole"}),
            {"weight": torch.ones(8, 8)},
            "change: expected .*lowrank",
        ),
        (
            LoraConfig(rank=2, alpha=2.0),
            layer(gate={**FIXED, "learn": True}, change={"kind": "lowrank", "rank": 2, "scale": 1.0}),
            {"down": torch.ones(2, 8), "up": torch.ones(8, 2), "score": torch.tensor(0.5)},
            "gate: expected a fixed one, got a learned one",
        ),
    ],
)
def test_what_its_method_would_not_have_made(
    config: MethodConfig, facts: dict[str, Any], tensors: dict[str, Tensor], message: str
) -> None:
    file = task_file("hidden", facts, tensors)
    file.method = config.to_dict()
    with pytest.raises(TaskFileError, match=f"part 'hidden': {message}"):
        model().load_task(file)
