"""Training tasks together: what they share gets the mean of their gradients, and nothing else of a task is touched."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taps_ext.model.mixing as mixing
from taps_ext import (
    ConfigError,
    FullConfig,
    JointTapsConfig,
    LoraConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    TapsConfig,
    TaskModel,
)
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


# ------------------------------------------------------------------------------------------ a prior over tasks


def even(names: str = "cd") -> dict[str, Task]:
    """Tasks of one size, so that joint steps are those of each alone."""
    return tasks(names)


def test_a_prior_without_precision_trains_tasks_apart() -> None:
    """tau = 0 is independent runs, to the bit."""
    last = [config(hierarchy=tau, select="last") for tau in (0.0, None)]
    together, apart = (model_of("cd", TapsConfig(lam=0.1)) for _ in range(2))
    Trainer(together, even(), last[0], quiet=True).fit("joint")
    Trainer(apart, even(), last[1], quiet=True).fit("incremental")
    assert same(values(together), values(apart))


def test_a_prior_without_freedom_keeps_tasks_equal() -> None:
    model = model_of("cd", LoraConfig(rank=2, alpha=4.0, norm="task"))
    Trainer(model, even(), config(hierarchy=float("inf")), quiet=True).fit("joint")
    one, other = model.state("c"), model.state("d")
    for name, part in one.table.items():
        if part.replacement is None:
            for p, q in zip(part.parameters(), other.table[name].parameters(), strict=True):
                assert torch.equal(p, q)
    assert one.table["conv"].change.up.any()


def test_one_task_has_no_prior() -> None:
    models = []
    for tau in (None, 7.0, float("inf")):
        models.append(model_of("c", TapsConfig(lam=0.1)))
        Trainer(models[-1], even("c"), config(hierarchy=tau), quiet=True).fit("joint")
    assert same(values(models[0]), values(models[1])) and same(values(models[0]), values(models[2]))


@pytest.mark.parametrize("tau", [0.5, 30.0])
def test_a_step_of_the_prior_is_the_minimum_of_its_penalty(tau) -> None:
    """(x' - x) / lr + tau * (x' - mean) = 0 for every task, in float32: two roundings of values of size 1."""
    from taps_ext.train.hierarchy import Hierarchy

    model = model_of("cd", FullConfig())
    prior = Hierarchy({name: model.state(name) for name in "cd"}, tau)
    for group in prior.groups:
        for p in group:
            p.data, p.grad = torch.randn_like(p), torch.ones_like(p)
    before = [[p.detach().clone() for p in group] for group in prior.groups]
    prior.step("cd", 0.1)
    for group, old in zip(prior.groups, before, strict=True):
        mean = torch.stack(old).double().mean(0)
        for p, x in zip(group, old, strict=True):
            assert torch.allclose(p.double(), (x.double() + 0.1 * tau * mean) / (1 + 0.1 * tau), rtol=0, atol=2e-6)


def test_tasks_of_other_parts_have_no_prior() -> None:
    model = model_of("c", TapsConfig(lam=0.1))
    model.add_task("d", num_classes=3, config=LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="hierarchy: expected tasks with the same parts, got 'c' and 'd'"):
        Trainer(model, even(), config(hierarchy=1.0), quiet=True).fit("joint")


# -------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    "method",
    [JointTapsConfig(lam=0.1), SeparateLayersConfig(bottom=1, joint=True), ScaleBiasConfig(simultaneous=True)],
    ids=lambda method: method.method,
)
def test_the_order_of_tasks_does_not_matter(method) -> None:
    """Of two: their gradients are added, and what they share moves by the sum."""
    one, other = model_of("ab", method), model_of("ba", method)
    Trainer(one, tasks("ab"), config(select="last"), quiet=True).fit("joint")
    Trainer(other, tasks("ba"), config(select="last"), quiet=True).fit("joint")
    mine, theirs = values(one), values(other)
    assert same(mine, {key: theirs[key] for key in mine})


def test_all_private_is_fine_tuning_and_none_is_one_network() -> None:
    """METHODS A2: bottom = L equals independent runs to the bit; with bottom = 0 tasks differ in their heads alone."""
    settings = config(select="last")
    private, alone = (model_of("cd", SeparateLayersConfig(bottom=2, joint=joint)) for joint in (True, False))
    assert not private.families
    Trainer(private, even(), settings, quiet=True).fit("joint")
    Trainer(alone, even(), settings, quiet=True).fit("incremental")
    assert same(values(private), values(alone))
    shared = model_of("cd", SeparateLayersConfig(bottom=0, joint=True))
    Trainer(shared, even(), settings, quiet=True).fit("joint")
    assert list(shared.state("c").table) == ["fc"] and shared.report("c").parameters == 3 * 8 + 3
    assert shared.report("c").shared == sum(p.numel() for n, p in shared.base.named_parameters() if "fc" not in n)


def test_parameters_are_what_is_shared_and_what_is_private() -> None:
    """METHODS A2: total = shared + T * private, exactly."""
    model = model_of("ab", SeparateLayersConfig(bottom=1, joint=True))
    every = sum(p.numel() for p in model.base.parameters())
    private = model.report("a").parameters
    assert private == 6 * 9 + 6 + 12 + 8 * 3 + 3  # the convolution, its norm, the head
    held = {id(p): p.numel() for n in ("_states", "_families") for p in getattr(model, n).parameters()}
    assert sum(held.values()) == every - private + 2 * private


# ------------------------------------------------------------------------------------------------------ lean


def test_lean_first_shares_and_then_lets_gates_in(tmp_path, monkeypatch) -> None:
    """Also killed between two tasks and resumed: the same files."""
    whole = model_of()
    results = Trainer(whole, tasks(), config(tmp_path / "whole"), quiet=True).fit("lean")
    assert set(results) == {"a", "b"} and not (tmp_path / "whole" / "%joint.state").exists()
    assert whole.families["joint-taps"].table["conv"].change.delta.any()
    fit = Trainer._fit_task

    def once(trainer, name, *args):
        if name == "b":
            raise KeyboardInterrupt
        return fit(trainer, name, *args)

    monkeypatch.setattr(Trainer, "_fit_task", once)
    with pytest.raises(KeyboardInterrupt):
        Trainer(model_of(), tasks(), config(tmp_path / "parts"), quiet=True).fit("lean")
    monkeypatch.setattr(Trainer, "_fit_task", fit)
    Trainer(model_of(), tasks(), config(tmp_path / "parts"), quiet=True).fit("lean")
    for file in (tmp_path / "whole").glob("*.taps"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes(), file.name


def test_lean_tasks_do_not_depend_on_each_other(tmp_path) -> None:
    """Their second stage, in any order, gives the same files."""
    for order in ("ab", "ba"):
        Trainer(model_of(order), tasks(order), config(tmp_path / order), quiet=True).fit("lean")
    for name in "ab":
        one, other = ((tmp_path / order / f"{name}.taps").read_bytes() for order in ("ab", "ba"))
        assert one == other


def test_lean_needs_something_to_share() -> None:
    with pytest.raises(ConfigError, match="mode: expected 'joint' or 'incremental', since the tasks share nothing"):
        Trainer(model_of("ab", TapsConfig(lam=0.1)), tasks(), config(), quiet=True).fit("lean")
    with pytest.raises(ConfigError, match=r"mode: expected one of .* got 'together'"):
        Trainer(model_of(), tasks(), config(), quiet=True).fit("together")


def test_one_pass_for_all_tasks_trains_what_one_after_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 but for Deltas and scores, which are stored in float32: each of the 15 steps may round them another
    way, by 2**-24 of values below one."""
    found = []
    for road in ("layers", "tasks"):
        monkeypatch.setattr(mixing, "forced", road)
        passes: list[int] = []
        model = model_of("abc").double()
        model.base.hidden.register_forward_pre_hook(lambda module, args, seen=passes: seen.append(len(args[0])))
        given = {name: Task(train=(data(name)[0].double(), data(name)[1])) for name in "abc"}
        Trainer(model, tasks=given, config=config(mix="all", select="last")).fit(mode="joint")
        found.append((values(model), passes))
    (mixed, together), (alone, apart) = found
    assert max(together) == 24 and max(apart) == 8  # three batches of eight in one pass
    assert mixed.keys() == alone.keys()
    for key, tensor in alone.items():
        assert (mixed[key].double() - tensor.double()).abs().max() < 15 * 2**-24, key
