"""Models whose blocks are checkpointed, and the same without."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from models import settle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taps_ext import TapsConfig, TaskModel


class Block(nn.Module):
    """`frozen`: its norm's work is done without gradients. `drop`: of a dropout at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Conv2d(6, 6, 1)
        self.drop, self.frozen = nn.Dropout(0.0), False

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            y = F.relu(self.norm(self.conv(x)))
        return x + self.drop(self.last(y))


class Net(nn.Module):
    """`reentrant`: None runs its blocks plainly, else which kind of checkpointing."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.first, self.second = Block(), Block()
        self.fc = nn.Linear(6, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x))
        for block in (self.first, self.second):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return {"logits": self.fc(x.mean(dim=(2, 3)))}


def two_tasks(base: nn.Module, gates: str = "host", config=None) -> TaskModel:
    model = TaskModel(base, TapsConfig(lam=0.5) if config is None else config, gates=gates)
    torch.manual_seed(1)
    for name in ("a", "b"):
        model.add_task(name, num_classes=4)
        with torch.no_grad():
            for layer, part, _ in model.state(name).gated():
                part.change.delta.normal_(0, 0.1)
                if part.gate.score is not None:
                    part.gate.score.fill_(0.05 if (layer.startswith("first") == (name == "a")) else 0.15)
    return model.train()


def gradients(model: TaskModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def plain_and_checkpointed(reentrant: bool, gates: str = "host", config=None) -> tuple[TaskModel, TaskModel]:
    torch.manual_seed(0)
    base = settle(Net())
    other = copy.deepcopy(base)
    other.reentrant = reentrant
    return two_tasks(base, gates, config), two_tasks(other, gates, config)


def returning(kind: type) -> TaskModel:
    class Wrapped(Net):
        def forward(self, x: Tensor):
            return kind(super().forward(x)["logits"])

    return two_tasks(settle(Wrapped(True)))
