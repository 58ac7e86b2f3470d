"""The Trainer's further settings: smoothing, averages, early stopping, transforms, and exact resumption."""

from __future__ import annotations

import math
import os
import random
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle
from test_trainer import build, data, equal, fit, tensors
from torch import Tensor, nn
from torch.utils.data import Dataset

from taps_ext import ConfigError, FullConfig, TapsConfig, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.average import Average
from taps_ext.train.task import augmented

EVERYTHING = {
    "plain": {},
    "adamw": {"optimizer": "adamw", "weight_decay": 1e-3},
    "average": {"ema": 0.9, "label_smoothing": 0.1},
    "accumulated bf16": {"accumulate": 3, "amp": "bf16", "clip_norm": 1.0},
    "sampled": {"warmup_epochs": 0, "lr": 0.05},
    "everything": {
        "ema": 0.8,
        "label_smoothing": 0.1,
        "patience": 3,
        "accumulate": 2,
        "amp": "bf16",
        "budget": 0.5,
        "freeze_after": 3,
    },
}


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("at", [1, 7, 13])
def test_an_interrupted_run_resumes_bit_equal(at: int, name: str, tmp_path) -> None:
    """In one process: the whole state is in one file, random numbers included (dropout draws them)."""
    settings = {"lr": 0.01, "schedule": "cosine", **EVERYTHING[name]}
    config = TapsConfig(lam=3.0, gate_fraction=0.25) if name == "sampled" else TapsConfig(lam=0.5)
    whole = build(config, dropout=0.3)
    reference = fit(whole, **settings)
    tensors_of_whole = tensors(whole)
    steps = []

    def stop_once(inputs: Tensor, generator: torch.Generator) -> Tensor:
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return inputs

    model = build(config, dropout=0.3)
    with pytest.raises(TrainingInterrupted, match="run it again to go on"):
        fit(model, task={"augment": stop_once}, out=str(tmp_path), **settings)
    assert (tmp_path / "t.state").exists()
    fresh = TaskModel(whole.unload(), config)
    fresh.add_task("t", num_classes=4)
    result = fit(fresh, task={"augment": stop_once}, out=str(tmp_path), **settings)
    assert equal(tensors(fresh), tensors_of_whole)
    assert result.history == reference.history
    assert name != "sampled" or result.history[1]["layers_open"] < 4  # some layer has estimated its gradient
    assert result.test == reference.test and not (tmp_path / "t.state").exists()


def test_smoothing_is_of_the_training_loss_alone() -> None:
    x, y = data(16)
    model = build(FullConfig())
    Trainer(
        model, {"t": Task(train=(x, y), val=(x, y))}, TrainConfig(epochs=1, batch_size=16, lr=0.05, label_smoothing=0.2)
    ).fit()
    by_hand = build(FullConfig()).train()
    optimizer = torch.optim.SGD(by_hand.parameter_groups("t", lr=0.05), momentum=0.9)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(by_hand(x[order], task="t"), y[order], label_smoothing=0.2).backward()
    optimizer.step()
    assert equal(tensors(model), tensors(by_hand))
    with pytest.raises(ConfigError, match="label_smoothing: expected 0 for task 't', whose loss is not"):
        fit(build(), task={"loss": F.multi_margin_loss}, label_smoothing=0.1)


def test_the_average_by_hand() -> None:
    """d = min(decay, (1 + n) / (10 + n)); closed Deltas rest, scores are not averaged."""
    model = build()
    state = model.state("t")
    with torch.no_grad():
        for index, (_, part, _) in enumerate(state.gated()):
            part.change.delta.normal_(0, 0.1)
            part.gate.score.fill_(0.05 if index == 1 else 0.15)
    average = Average(state, 0.15)
    closed = [list(state.gated())[1][0]]
    assert closed == ["conv2"]
    names = [name for name, _ in state.named_parameters() if not name.endswith("score")]
    assert list(average.values) == names
    want = {name: p.detach().clone() for name, p in state.named_parameters() if name in names}
    optimizer = torch.optim.SGD(model.parameter_groups("t", lr=0.05), momentum=0.9)
    x, y = data(16)
    for step in (1, 2, 3, 4):
        if step == 3:  # its average is away from its value by now, and rests there
            with torch.no_grad():
                state.table["hidden"].gate.score.fill_(0.05)
            closed.append("hidden")
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x, task="t"), y).backward()
        optimizer.step()
        average.update()
        decay = min(0.15, (1 + step) / (10 + step))
        for name, parameter in state.named_parameters():
            if name in want and not any(name == f"parts./{layer}.change.delta" for layer in closed):
                want[name] += (1 - decay) * (parameter.detach() - want[name])
    live = {name: p.detach().clone() for name, p in state.named_parameters()}
    assert not torch.equal(live["parts./hidden.change.delta"], average.values["parts./hidden.change.delta"])
    with average.used():
        for name, parameter in state.named_parameters():
            # torch's lerp and this sum round differently, once or twice a step.
            torch.testing.assert_close(parameter, want.get(name, live[name]), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, live[name]) for name, p in state.named_parameters())


def test_averages_are_what_is_kept() -> None:
    kept = []
    for ema in (None, 0.99):
        model = build()
        result = fit(model, ema=ema, select="last", schedule="constant")
        kept.append((tensors(model), result.history[-1]))
    assert not equal(kept[0][0], kept[1][0])
    scores = [name for name in kept[0][0] if name.endswith("score")]
    assert scores and all(torch.equal(kept[0][0][name], kept[1][0][name]) for name in scores)
    assert kept[0][1]["val_loss"] != kept[1][1]["val_loss"] and kept[0][1]["loss"] == kept[1][1]["loss"]


def test_patience_stops_when_nothing_gets_better() -> None:
    values = iter([0.5, 0.6, 0.7, 0.6, 0.65, 0.6, 0.9, 0.9])
    result = fit(
        build(),
        epochs=8,
        warmup_epochs=1,
        patience=3,
        task={"metrics": {"scripted": lambda outputs, targets: next(values)}, "test": None, "val": data(16, 2)},
    )
    assert len(result.history) == 6 and result.epoch == 2


@pytest.mark.parametrize("select", ["best", "last"])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_patience_waits_for_the_warm_up(value: float, select: str) -> None:
    """Whatever is kept: what stays equal is no better. The first epoch after the warm-up sets the mark."""
    metrics = {"never": lambda outputs, targets: value}
    model = build(TapsConfig(lam=0.0))  # no gate closes, which would be better
    result = fit(model, epochs=8, warmup_epochs=3, patience=2, select=select, task={"metrics": metrics})
    assert len(result.history) == 6 and result.epoch == 5


def test_fewer_weights_at_the_same_metric_are_better() -> None:
    metrics = {"same": lambda outputs, targets: 0.5}
    result = fit(build(TapsConfig(lam=0.3)), epochs=9, warmup_epochs=1, patience=2, task={"metrics": metrics})
    shares = [entry["share"] for entry in result.history]
    sparser = [i for i in range(2, len(shares)) if shares[i] < min(shares[1:i])]
    assert sparser and len(shares) == min(9, sparser[-1] + 3), shares


def test_averages_of_half_precision_move() -> None:
    """In bfloat16 itself a step of 1/1000 of the way is lost to rounding, and the average would stand still."""
    model = TaskModel(settle(TinyNet()).bfloat16(), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=4)
    average = Average(model.state("t"), 0.999)
    head = dict(model.state("t").named_parameters())["parts./fc.module.weight"]
    assert head.dtype == torch.bfloat16
    with torch.no_grad():
        for value, steps in ((1.0, 500), (1.25, 3000)):
            head.fill_(value).grad = torch.zeros_like(head)
            for _ in range(steps):
                average.update()
    found = average.values["parts./fc.module.weight"]
    assert 1.23 < found.mean().item() < 1.25  # 1.25 - 0.25 * 0.999 ** 3000 = 1.2376
    with average.used():
        assert torch.equal(head, found.bfloat16())
    assert head.mean().item() == 1.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number below 1"),
        ({"ema": -0.1}, "ema: expected a number in"),
        ({"ema": 1}, "ema: expected a number below 1"),
        ({"patience": 0}, "patience: expected an int >= 1"),
        ({"patience": 2.5}, "patience: expected an int >= 1"),
        ({"out": 5}, "out: expected a folder's path or None, got 5"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


class Flip(nn.Module):
    """Like torchvision's transforms: one sample, numbers from torch's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1) if torch.rand(()) < 0.5 else x


def test_a_transform_sees_one_sample_at_a_time_and_draws_from_the_batchs_seed() -> None:
    x = torch.arange(64.0).reshape(16, 1, 2, 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    once, again, other = augmented(Flip(), x, 3), augmented(Flip(), x, 3), augmented(Flip(), x, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once, again) and not torch.equal(once, other)
    flipped = [not torch.equal(a, b) for a, b in zip(once, x, strict=True)]
    assert any(flipped) and not all(flipped)


class Noise(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.randn_like(x)


def test_transforms_with_other_settings_are_another_run(tmp_path) -> None:
    """Both print as "Noise()"; the finished run of the first is not the second's."""
    fit(build(), out=str(tmp_path), epochs=1, task={"augment": nn.Sequential(Noise(0.0))})
    fit(build(), out=str(tmp_path), epochs=1, task={"augment": nn.Sequential(Noise(0.0))})
    with pytest.raises(ConfigError, match=r"augment = .*'scale': 0\.0.*, got .*'scale': 5\.0"):
        fit(build(), out=str(tmp_path), epochs=1, task={"augment": nn.Sequential(Noise(5.0))})
    with pytest.raises(ConfigError, match="augment: expected a function or a transform, got str"):
        Task(train=data(), augment="flip")


def test_no_gradients_are_left_behind() -> None:
    model = build()
    fit(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bad_loss_is_found_before_any_task_trains(tmp_path) -> None:
    model = build()
    model.add_task("u", num_classes=4)
    tasks = {"t": Task(train=data()), "u": Task(train=data(), loss=F.multi_margin_loss)}
    with pytest.raises(ConfigError, match="label_smoothing: expected 0 for task 'u'"):
        Trainer(model, tasks, TrainConfig(label_smoothing=0.1), quiet=True)


class Pictures(Dataset):
    """A map-style dataset with a random transform of its own, as torchvision's are."""

    def __init__(self, transform) -> None:
        self.x, self.targets = data()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.x[index]), int(self.targets[index])


def pythons(x: Tensor) -> Tensor:
    """A transform that draws from Python's and NumPy's generators, as older ones do."""
    x = x.flip(-1) if random.random() < 0.5 else x
    return x + float(np.random.normal(0, 0.1)) + random.gauss(0, 0.1)


@pytest.mark.parametrize("kind", ["v1", "v2", "function"])
@pytest.mark.parametrize("where", ["dataset", "task"])
def test_transforms_resume_bit_equal(where: str, kind: str, tmp_path) -> None:
    transform = pythons
    if kind == "v1":
        v1 = pytest.importorskip("torchvision.transforms")
        choice = v1.RandomChoice([v1.RandomHorizontalFlip(1.0), v1.RandomVerticalFlip(1.0)])
        transform = v1.Compose([v1.RandomApply([choice]), v1.RandomCrop(8, padding=1)])
    if kind == "v2":
        v2 = pytest.importorskip("torchvision.transforms.v2")
        transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8, padding=1), v2.RandomErasing(p=0.3)])
    val = data(32, 5)
    steps, stop = [], []

    def task(*stop_at: int) -> dict:
        stop[:] = stop_at

        def watch(outputs: Tensor, targets: Tensor) -> Tensor:
            steps.append(1)
            if len(steps) in stop:
                os.kill(os.getpid(), signal.SIGINT)
            return F.cross_entropy(outputs, targets)

        if where == "dataset":
            return {"train": Pictures(transform), "val": val, "loss": watch}
        return {"train": data(), "val": val, "augment": transform, "loss": watch}

    whole = build()
    fit(whole, task=task())
    want = tensors(whole)
    steps.clear()
    with pytest.raises(TrainingInterrupted):
        fit(build(), task=task(8), out=str(tmp_path))
    fresh = TaskModel(whole.unload(), TapsConfig(lam=0.5))
    fresh.add_task("t", num_classes=4)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)  # another process has other numbers
    fit(fresh, task=task(), out=str(tmp_path))
    assert equal(tensors(fresh), want)
    plain = build()
    fit(plain, task={"train": data(), "val": val})
    assert not equal(tensors(plain), want)


def test_a_device_is_looked_at_when_it_is_set() -> None:
    for device in ("gpu", "cuda:x", 0, "", "meta"):
        with pytest.raises(ConfigError, match="device: expected"):
            TrainConfig(device=device)
    assert TrainConfig(device=torch.device("cuda:99")).to_dict()["device"] == "cuda:99"
