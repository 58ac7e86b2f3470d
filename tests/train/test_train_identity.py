"""What tells one run from another, what augment gets, and settings that would have no effect."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import ConfigError, FullConfig, TapsConfig, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer
from taps_ext.train.identity import describe
from taps_ext.train.task import augmented


def _loss_of(scale: float) -> Callable[..., Tensor]:
    return lambda outputs, targets: scale * F.cross_entropy(outputs, targets)


def _plus(inputs: Tensor, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return inputs + scale


class _Module(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.kinds = np.array(scale), {"b", "a", "c"}

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: _loss_of(scale),
        lambda scale: functools.partial(_plus, scale=scale),
        lambda scale: functools.partial(F.cross_entropy, weight=torch.tensor([1.0, scale])),
        _Module,
        np.float32,
        lambda scale: (lambda x: x + 1.0) if scale == 1.0 else (lambda x: x * 2.0),
    ],
)
def test_settings_tell_functions_apart_by_what_they_hold(make) -> None:
    one, same, other = (json.dumps(describe(make(scale))) for scale in (1.0, 1.0, 3.0))
    assert one == same != other


def test_a_function_that_notes_what_it_sees_stays_the_same_setting() -> None:
    seen: list[int] = []

    def noting(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    before = json.dumps(describe(noting))
    noting(torch.zeros(3))
    assert json.dumps(describe(noting)) == before
    code = "from taps_ext.train.identity import describe; print(describe({'kinds': {'b', 'a', 'c'}}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "123"
    }
    assert len(found) == 1


def test_what_augment_gets_and_gives() -> None:
    def batch(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.rand(1, generator=generator)

    def sample(x: Tensor, p: float = 0.5) -> Tensor:
        return x if p > 0.0 else -x

    x = torch.randn(4, 3)
    assert augmented(batch, x, 0).shape == (4, 3) and torch.equal(augmented(sample, x, 0), x)
    assert not torch.equal(augmented(lambda x, generator=None: batch(x, generator), x, 0), x)
    with pytest.raises(ConfigError, match="augment: expected a tensor of each sample, got float"):
        augmented(lambda x: 1.0, x, 0)
    shapes = iter(((3,), (2,), (3,), (3,)))
    with pytest.raises(ConfigError, match=r"augment: expected samples of one shape, got \[3\] and \[2\]"):
        augmented(lambda x: torch.zeros(next(shapes)), x, 0)
    v2 = pytest.importorskip("torchvision.transforms.v2")
    for mixing in (v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)):
        with pytest.raises(ConfigError, match="mixes labels too"):
            Task(train=(x, torch.zeros(4, dtype=torch.int64)), augment=mixing)


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": 4, "freeze_after": 2}])
def test_a_penalty_that_never_acts_is_said(options) -> None:
    model = TaskModel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), TapsConfig(lam=5.0))
    model.add_task("t")
    data = torch.randn(8, 3), torch.arange(8) % 2
    with pytest.warns(UserWarning, match="the penalty never acts: gates move for 2 epochs"):
        Trainer(model, {"t": Task(train=data, val=data)}, TrainConfig(batch_size=4, **options), quiet=True).fit()


def test_gates_that_never_rest_are_said() -> None:
    model = TaskModel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), TapsConfig(lam=5.0))
    model.add_task("t")
    data, config = (torch.randn(8, 3), torch.arange(8) % 2), TrainConfig(epochs=3, freeze_after=4, warmup_epochs=0)
    with pytest.warns(UserWarning, match="gates never rest: freeze_after = 4, epochs = 3"):
        Trainer(model, {"t": Task(train=data, val=data)}, config, quiet=True).fit()


def test_evaluation_takes_the_batches_it_is_told() -> None:
    sizes: list[int] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    model = TaskModel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), FullConfig())
    model.add_task("t", head=Noting(4, 2))
    data = torch.randn(10, 3), torch.arange(10) % 2
    for settings, expected in ((TrainConfig(batch_size=4), [4, 4, 2]), (TrainConfig(eval_batch_size=7), [7, 3])):
        sizes.clear()
        Trainer(model, {"t": Task(train=data)}, settings, quiet=True).evaluate("t", data)
        assert sizes == expected
