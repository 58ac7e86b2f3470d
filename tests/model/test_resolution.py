"""One base at several resolutions: the size picks the task, and nothing of one reaches another."""

from __future__ import annotations

import copy

import pytest
import torch
from models import TinyNet, settle
from torch import Tensor

from taps_ext import ByResolution, ConfigError, ScaleBiasConfig, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer

SIZES = {8: "signs@8", (12, 10): "signs@12x10"}


def images(height: int, width: int, samples: int = 12) -> Tensor:
    return torch.randn(samples, 3, height, width, generator=torch.Generator().manual_seed(height))


def made(**settings) -> tuple[TaskModel, ByResolution]:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), ScaleBiasConfig(**settings))
    for name in SIZES.values():
        model.add_task(name, num_classes=3)
    with torch.no_grad():
        for parameter in model.state("signs@8").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, ByResolution(model, SIZES)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_the_size_picks_the_task(compiled: bool) -> None:
    """Bit for bit what the task does by its name."""
    model, by = made()
    by.eval()
    assert not model.training
    torch._dynamo.reset()
    run = torch.compile(by, backend="eager") if compiled else by
    for (height, width), name in {(8, 8): "signs@8", (12, 10): "signs@12x10"}.items():
        x = images(height, width)
        with model.use_task(name):
            want = model(x)
        assert torch.equal(run(x), want)
        assert by.task_of(x) == name and model.active_task is None


def test_statistics_are_those_of_one_resolution() -> None:
    """A step at one size leaves every tensor of the other's task, and moves its own running statistics as the task's
    step by its name does, bit for bit."""
    model, by = made()
    other = copy.deepcopy(model)
    by.train()
    before = {key: value.clone() for key, value in model.state("signs@12x10").state_dict().items()}
    start = model.state("signs@8").table["bn1"].running_mean.clone()
    x = images(8, 8)
    by(x).square().mean().backward()
    other.train()(x, task="signs@8").square().mean().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state("signs@12x10").state_dict().items())
    mine, theirs = model.state("signs@8"), other.state("signs@8")
    assert not torch.equal(mine.table["bn1"].running_mean, start)
    assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), theirs.buffers(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_trained_together_they_share_theta(tmp_path) -> None:
    """Simultaneous patches: one theta in a shared file, a norm set and a head a resolution."""
    model, by = made(simultaneous=True)
    tasks = {}
    for (height, width), name in by.tasks.items():
        data = images(height, width, 24), torch.arange(24) % 3
        tasks[name] = Task(train=data, val=data, test=data)
    config = TrainConfig(epochs=2, batch_size=8, lr=0.05, warmup_epochs=0, out=str(tmp_path))
    Trainer(model, tasks, config, quiet=True).fit("joint")
    assert sorted(f.name for f in tmp_path.glob("*.taps")) == [
        "scale-bias.shared.taps",
        "signs@12x10.taps",
        "signs@8.taps",
    ]
    fresh = TaskModel(settled()).eval()
    for name in SIZES.values():
        fresh.load_task(tmp_path / f"{name}.taps")
    again, by = ByResolution(fresh, SIZES), by.eval()
    with torch.no_grad():
        assert all(torch.equal(again(x), by(x)) for x in (images(8, 8), images(12, 10)))
    own = [fresh.state(name).table["bn1"].running_mean for name in SIZES.values()]
    assert not torch.equal(*own)


def settled() -> TinyNet:
    torch.manual_seed(0)
    return settle(TinyNet())


def test_mistakes_are_told() -> None:
    model, by = made()
    with pytest.raises(ConfigError, match="input: expected images of 8 x 8, 12 x 10, got 9 x 8"):
        by(images(9, 8))
    for tasks, message in (
        ({}, "tasks: expected {size: task}, got {}"),
        ({8: "sings@8"}, "task: expected one of .*did you mean 'signs@8'"),
        ({0: "signs@8"}, r"tasks: expected sizes such as 64 or \(64, 96\), got 0"),
        ({(8, 8, 3): "signs@8"}, r"got \(8, 8, 3\)"),
        ({8: "signs@8", (8, 8): "signs@12x10"}, r"expected different sizes, got \(8, 8\) twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            ByResolution(model, tasks)
    with pytest.raises(ConfigError, match="model: expected a TaskModel, got TinyNet"):
        ByResolution(model.unload(), SIZES)
