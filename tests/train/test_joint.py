"""Training tasks together: what they share gets the mean of their gradients, and nothing else of a task is touched."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import ConfigError, JointTapsConfig, TapsConfig, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.joint import JointRun
from taps_ext.train.mixing import schedule

SIZES = {"a": 40, "b": 24}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.hidden(F.relu(self.norm(self.conv(x))).mean((2, 3)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data(name: str) -> tuple[Tensor, Tensor]:
    """Bright or dark images, which a task calls by names of its own."""
    generator = torch.Generator().manual_seed(ord(name))
    y = torch.arange(SIZES.get(name, 32)) % 3
    return torch.randn(len(y), 1, 6, 6, generator=generator) + y[:, None, None, None], (y + ord(name)) % 3


def tasks(names: str = "ab") -> dict[str, Task]:
    return {name: Task(train=data(name), val=data(name), test=data(name)) for name in names}


def model_of(names: str = "ab", config: TapsConfig | None = None) -> TaskModel:
    model = TaskModel(net(), config or JointTapsConfig(lam=0.1))
    for name in names:
        torch.manual_seed(ord(name))
        model.add_task(name, num_classes=3)
    return model


def config(out=None, **more) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.1, "warmup_epochs": 1}
    return TrainConfig(**{**settings, **more}, out=None if out is None else str(out))


def values(model: TaskModel) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.endswith("extra_state")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_tasks_learn_and_are_served_from_their_files(tmp_path) -> None:
    model = model_of()
    before = copy.deepcopy(model.base.state_dict())
    results = Trainer(model, tasks(), config(tmp_path, epochs=8), quiet=True).fit("joint")
    assert {name: result.test["accuracy"] > 0.6 for name, result in results.items()} == {"a": True, "b": True}
    assert all(torch.equal(model.base.state_dict()[key], value) for key, value in before.items())
    assert any(part.change.delta.any() for part in model.families["joint-taps"].table.values())
    assert sorted(file.name for file in tmp_path.glob("*.taps")) == ["a.taps", "b.taps", "joint-taps.shared.taps"]
    assert not (tmp_path / "%joint.state").exists()
    fresh = TaskModel(net()).eval()
    model.eval()
    x = data("a")[0]
    with torch.no_grad():
        for name in "ab":
            assert fresh.load_task(tmp_path / f"{name}.taps") == name  # its parent lies beside it
            assert torch.equal(fresh(x, task=name), model(x, task=name))
    assert list(fresh.families) == ["joint-taps"] and fresh.report("a").shared == fresh.report("b").shared > 0


@pytest.mark.parametrize("ema", [None, 0.9])
def test_one_task_over_a_frozen_family_is_trained_as_it_is_alone(tmp_path, ema) -> None:
    """To the bit (METHODS A4: T = 1 with S frozen is incremental TAPS)."""
    models = []
    for mode in ("incremental", "joint"):
        model = model_of("a")
        with torch.no_grad():
            for parameter in model.families["joint-taps"].parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        model.save_shared("joint-taps", tmp_path / f"{mode}.taps")
        Trainer(model, tasks("a"), config(ema=ema), quiet=True).fit(mode)
        models.append(model)
    assert same(values(models[0]), values(models[1]))


def test_a_family_of_zeros_is_none(tmp_path) -> None:
    """And over S = 0, frozen, joint TAPS is TAPS: the same bits, whichever way W + S is made."""
    joint = model_of("a")
    joint.save_shared("joint-taps", tmp_path / "shared.taps")
    alone = model_of("a", TapsConfig(lam=0.1))
    for model, mode in ((joint, "joint"), (alone, "incremental")):
        Trainer(model, tasks("a"), config(), quiet=True).fit(mode)
    mine, theirs = joint.state("a").state_dict(), alone.state("a").state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def run_of(model: TaskModel, settings: TrainConfig) -> JointRun:
    trainer = Trainer(model, tasks(), settings, quiet=True)
    made = {name: trainer._data(name, task) for name, task in trainer.tasks.items()}
    batches, evaluate = ({name: pair[i] for name, pair in made.items()} for i in range(2))
    return JointRun(model, trainer.tasks, settings, batches, evaluate)


def test_what_is_shared_gets_the_mean_of_the_tasks_gradients() -> None:
    """In float64, against each task's own backward."""
    model = model_of().double()
    run = run_of(model, config())
    batches = {
        name: [t.double() if t.is_floating_point() else t for t in next(run.batches[name].epoch(0))] for name in "ab"
    }
    model.train()
    family = model.families["joint-taps"]
    expected = [torch.zeros_like(p) for p in family.parameters()]
    for name in "ab":
        loss = F.cross_entropy(model(batches[name][0], task=name), batches[name][1])
        for total, grad in zip(expected, torch.autograd.grad(loss, list(family.parameters())), strict=True):
            total += grad / 2
    for name in "ab":
        run.streams[name] = iter([batches[name]])
        run.progress.taken[name] = run.sizes[name] * 7 + 1  # the stream at hand is read
    before = [p.detach().clone() for p in family.parameters()]
    run._step(("a", "b"), run.steps_per_epoch)
    for p, old, grad in zip(family.parameters(), before, expected, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-5, atol=1e-12)  # S is float32
        assert torch.allclose(old - p, 0.1 * p.grad, rtol=0, atol=1e-7)


def test_a_task_that_a_step_has_not_is_not_touched() -> None:
    model = model_of()
    run = run_of(model, config(mix="round-robin"))
    model.train()
    before = {name: {k: t.clone() for k, t in model.state(name).state_dict().items()} for name in "ab"}
    run._step(("a",), run.steps_per_epoch)
    run._step(("a",), run.steps_per_epoch)
    now = model.state("b").state_dict()
    assert all(torch.equal(now[key], value) for key, value in before["b"].items())
    assert any(not torch.equal(model.state("a").state_dict()[key], value) for key, value in before["a"].items())


@pytest.mark.parametrize("mix", [None, "proportional"])
def test_stopped_and_resumed_it_is_the_run_that_was_not(tmp_path, mix, monkeypatch) -> None:
    whole = model_of()
    Trainer(whole, tasks(), config(tmp_path / "whole", mix=mix, ema=0.5), quiet=True).fit("joint")
    steps, count = JointRun._step, Counter()

    def counted(run, *args) -> None:
        steps(run, *args)
        count["steps"] += 1
        if count["steps"] in (3, 9):
            monkeypatch.setattr(stop[0], "asked", True)

    stop = []
    train = JointRun.train_epoch
    monkeypatch.setattr(
        JointRun, "train_epoch", lambda run, log, s: (stop.clear(), stop.append(s), train(run, log, s))[2]
    )
    monkeypatch.setattr(JointRun, "_step", counted)
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            Trainer(model_of(), tasks(), config(tmp_path / "parts", mix=mix, ema=0.5), quiet=True).fit("joint")
    parts = model_of()
    Trainer(parts, tasks(), config(tmp_path / "parts", mix=mix, ema=0.5), quiet=True).fit("joint", resume=True)
    assert same(values(whole), values(parts))
    for file in (tmp_path / "whole").glob("*.taps"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    other = model_of("ab", TapsConfig(lam=0.1))
    with pytest.raises(ConfigError, match="was started with method.method = 'joint-taps', got 'taps'"):
        Trainer(other, tasks(), config(tmp_path / "parts", mix=mix, ema=0.5), quiet=True).fit("joint")


def test_a_task_that_is_added_is_trained_alone(tmp_path) -> None:
    Trainer(model_of(), tasks(), config(tmp_path), quiet=True).fit("joint")
    files = {file.name: file.read_bytes() for file in tmp_path.glob("*.taps")}
    more = model_of("abc")
    results = Trainer(more, tasks("abc"), config(tmp_path), quiet=True).fit("joint")
    assert set(results) == {"a", "b", "c"}
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    fresh = TaskModel(net()).eval()
    for name in "abc":
        fresh.load_task(tmp_path / f"{name}.taps")
    more.eval()
    with torch.no_grad():
        assert all(torch.equal(fresh(data("a")[0], task=n), more(data("a")[0], task=n)) for n in "abc")


def test_what_joint_training_has_not_is_told(tmp_path) -> None:
    with pytest.raises(
        ConfigError, match="mode: task 'a' trains the family 'joint-taps' with others; expected 'joint'"
    ):
        Trainer(model_of(), tasks(), config(), quiet=True).fit()
    for settings in ({"budget": 0.5}, {"freeze_after": 1}, {"accumulate": 2}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Trainer(model_of(), tasks(), config(**settings), quiet=True).fit("joint")
    with pytest.raises(ConfigError, match=r"loss_weights: expected one of \['a', 'b'\], got 'z'"):
        Trainer(model_of(), tasks(), config(loss_weights={"z": 1.0}), quiet=True).fit("joint")
    with pytest.raises(ConfigError, match="mix: expected one of"):
        config(mix="some")


@pytest.mark.parametrize("mix", [None, "all", "proportional", "uniform", "temperature", "round-robin"])
def test_the_steps_of_an_epoch(mix) -> None:
    sizes = {"a": 30, "b": 10, "c": 5}
    steps = schedule(sizes, mix, 0, 3)
    assert steps == schedule(sizes, mix, 0, 3)
    count = Counter(name for step in steps for name in step)
    if mix in (None, "all"):
        assert steps == [("a", "b", "c")] * 30
        return
    assert len(steps) == 45 and all(len(step) == 1 for step in steps)
    if mix == "proportional":
        assert count == sizes and schedule(sizes, mix, 0, 4) != steps
    elif mix == "round-robin":
        assert set(count.values()) == {15}
    else:
        many = Counter(n for epoch in range(200) for step in schedule(sizes, mix, 1, epoch) for n in step)
        weights = {name: 1.0 if mix == "uniform" else size**0.5 for name, size in sizes.items()}
        for name, weight in weights.items():  # 9,000 draws: five standard deviations are below 2.6 %
            assert many[name] / 9000 == pytest.approx(weight / sum(weights.values()), abs=0.026)


def test_a_weight_of_zero_leaves_a_task_as_it_is_but_for_its_statistics() -> None:
    model = model_of()
    Trainer(model, tasks(), config(loss_weights={"b": 0.0}, warmup_epochs=3), quiet=True).fit("joint")
    head = model_of().state("b").head.weight
    assert torch.equal(model.state("b").head.weight, head)
