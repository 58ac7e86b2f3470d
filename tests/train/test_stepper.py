"""Optimizers and schedulers of the user's own, and the scale of losses under fp16."""

from __future__ import annotations

import math
import os
import signal
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from test_joint import config as joint_config
from test_joint import model_of, same, values
from test_joint import tasks as joint_tasks
from test_trainer import build, data, equal, tensors
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from taps_ext import ConfigError, DivergedError, FullConfig, TapsError
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.packing import pack, unpack
from taps_ext.train.precision import FLOOR


def trainer(model, out=None, loss=F.cross_entropy, optimizer=None, scheduler=None, **settings) -> Trainer:
    config = {"epochs": 4, "batch_size": 16, "lr": 0.05, **settings}
    task = Task(train=data(), val=data(32, 1), loss=loss)
    made = {"optimizer": optimizer, "scheduler": scheduler}
    out = None if out is None else str(out)
    return Trainer(model, {"t": task}, TrainConfig(**config, out=out), quiet=True, **made)


def stopping(*at: int):
    """A loss that asks to stop in these steps, and the steps that were taken."""
    taken: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        taken.append(int(torch.is_grad_enabled()))
        if taken[-1] and sum(taken) in at:
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, targets)

    return loss, taken


class Half:
    """A factor that keeps a number of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 0.5**step


class Counting(torch.optim.SGD):
    """An optimizer that keeps a tensor in a list, a tuple, and a number in its groups."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("kept", [torch.zeros_like(p), (0, 1.5)])
                    kept[0].add_(p.grad)
                    kept[1] = (kept[1][0] + 1, 1.5)
                    p.data.sub_(1e-3 * group["count"] * kept[0])


class Wide(torch.optim.SGD):
    """An optimizer that keeps float64 and large integers of float32 parameters, also within others."""

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            kept = self.state[p]
            if not kept:
                kept["count"] = torch.tensor(2**40)
                kept["more"] = {"sums": [torch.zeros_like(p, dtype=torch.float64)]}
                kept["seen"] = Counter()
            kept["count"] += 1
            kept["more"]["sums"][0] += p.grad.double() / 3
            kept["seen"].update(["steps"])
            p.data.sub_((0.01 * kept["more"]["sums"][0] + 1e-4 * (kept["count"] % 2**40)).float())


SCHEDULERS = {
    "none": None,
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=24),
    "steps": lambda o: schedulers.MultiStepLR(o, [3, 3, 9], gamma=0.5),
    "object": lambda o: schedulers.LambdaLR(o, Half()),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=5), schedulers.ExponentialLR(o, 0.9)], [5]
    ),
    "chain": lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]),
}
OPTIMIZERS = {
    "none": None,
    "adam": lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.9)),
    "nadam": torch.optim.NAdam,
    "counting": lambda groups: Counting(groups, momentum=0.5),
    "wide": Wide,
    "amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
}


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [("none", name) for name in SCHEDULERS if name != "none"]
    + [(name, "none") for name in OPTIMIZERS if name != "none"]
    + [("counting", "one cycle"), ("adam", "object")],
)
def test_what_the_user_brings_resumes_bit_equal(optimizer: str, scheduler: str, tmp_path) -> None:
    made = {"optimizer": OPTIMIZERS[optimizer], "scheduler": SCHEDULERS[scheduler]}
    whole, plain = build(dropout=0.3), build(dropout=0.3)
    want = trainer(whole, **made).fit()["t"].history
    trainer(plain).fit()
    assert not equal(tensors(whole), tensors(plain))  # and it does something
    loss, taken = stopping(4, 15)
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            trainer(build(dropout=0.3), tmp_path, loss, **made).fit()
    model = build(dropout=0.3)
    found = trainer(model, tmp_path, loss, **made).fit()["t"].history
    assert sum(taken) == 24 and equal(tensors(whole), tensors(model)) and found == want


def test_the_configs_own_by_factories_is_the_same_run() -> None:
    """The same optimizer made outside, and the same schedule by a scheduler: to the bit."""
    models = [build(), build(), build()]
    trainer(models[0], schedule="constant").fit()
    trainer(models[1], schedule="constant", optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9)).fit()
    trainer(models[2], scheduler=lambda o: schedulers.LambdaLR(o, lambda step: 1.0)).fit()
    assert equal(tensors(models[0]), tensors(models[1])) and equal(tensors(models[0]), tensors(models[2]))


def test_a_scheduler_is_stepped_once_a_step() -> None:
    rates: list[float] = []

    class Noting(schedulers.StepLR):
        def step(self, epoch=None):
            super().step(epoch)
            rates.append(self.get_last_lr()[0])

    trainer(build(), scheduler=lambda o: Noting(o, 5, gamma=0.5), accumulate=2).fit()
    assert len(rates) == 1 + 4 * 3 and rates[-1] == 0.05 * 0.25  # torch's own first step, then three an epoch


@pytest.mark.parametrize("mode", ["joint", "lean"])
def test_factories_in_joint_training(mode: str, tmp_path) -> None:
    def fit(model, out=None, loss=F.cross_entropy) -> None:
        tasks = {n: Task(train=t.train, val=t.val, loss=loss) for n, t in joint_tasks().items()}
        made = {"optimizer": OPTIMIZERS["counting"], "scheduler": SCHEDULERS["sequence"]}
        Trainer(model, tasks, joint_config(out), quiet=True, **made).fit(mode)

    whole, model = model_of(), model_of()
    fit(whole)
    loss, _ = stopping(7, 26)  # 30 losses of the joint run
    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            fit(model_of(), tmp_path, loss)
    fit(model, tmp_path, loss)
    if mode == "joint":
        assert same(values(whole), values(model))
    else:  # what comes back from files has no closed Deltas
        x = joint_tasks()["a"].train[0]
        with torch.no_grad():
            assert all(torch.equal(whole.eval()(x, task=n), model.eval()(x, task=n)) for n in "ab")


def test_other_factories_are_another_run(tmp_path) -> None:
    trainer(build(), tmp_path, optimizer=torch.optim.Adam, epochs=1).fit()
    trainer(build(), tmp_path, optimizer=torch.optim.Adam, epochs=1).fit()
    with pytest.raises(ConfigError, match=r"started with optimizer = 'torch.optim.adam.Adam', got 'torch.*NAdam'"):
        trainer(build(), tmp_path, optimizer=torch.optim.NAdam, epochs=1).fit()
    with pytest.raises(ConfigError, match="started with optimizer"):
        trainer(build(), tmp_path, epochs=1).fit()


def dropping(groups):
    return torch.optim.SGD(groups[1:])


def nameless(groups):
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)


class Closure(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Holding(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["kept"] = object()


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (dropping, "optimizer: expected one of all 16 parameters that are trained and no others, got 12 of them and 0"),
        (nameless, r"optimizer: expected one made of the groups as they are given.*groups named \[None\]"),
        (Closure, r"optimizer: expected one whose step\(\) needs no closure, got Closure"),
        (torch.optim.LBFGS, "optimizer: the factory failed: ValueError: LBFGS doesn't support per-parameter options"),
        (lambda groups: None, "optimizer: expected a factory that returns a torch Optimizer, got NoneType"),
        (Holding, r"^0\.kept: expected numbers, text, tensors, or lists.*, got object"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))]), "optimizer: expected a function that makes one.*, got SGD"),
    ],
)
def test_optimizers_that_cannot_be(optimizer, message: str) -> None:
    loss, taken = stopping()
    with pytest.raises(ConfigError, match=message):
        trainer(build(), loss=loss, optimizer=optimizer).fit()
    assert len(taken) <= 1


class Keeping(schedulers.StepLR):
    def __init__(self, optimizer) -> None:
        self.made = object()
        super().__init__(optimizer, 3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            schedulers.ReduceLROnPlateau,
            r"scheduler: expected one whose step\(\) needs no metric, got ReduceLROnPlateau",
        ),
        (Keeping, r"^scheduler\.made: expected numbers, text, tensors, or lists .* resumed, got object"),
        (lambda o: schedulers.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 3), "one of the optimizer that the"),
        (lambda o: 3, "scheduler: expected a factory that returns a torch LRScheduler, got int"),
        (schedulers.StepLR, "scheduler: the factory failed: TypeError"),
    ],
)
def test_schedulers_that_cannot_be_are_said_before_the_first_step(scheduler, message: str) -> None:
    loss, taken = stopping()
    with pytest.raises(ConfigError, match=message):
        trainer(build(), loss=loss, scheduler=scheduler).fit()
    assert not taken


@pytest.mark.parametrize(
    ("made", "setting", "value"),
    [
        ("optimizer", "momentum", 0.5),
        ("optimizer", "optimizer", "adamw"),
        ("optimizer", "betas", (0.5, 0.9)),
        ("optimizer", "hierarchy", 1.0),
        ("scheduler", "schedule", "step"),
        ("scheduler", "lr_warmup", 1),
        ("scheduler", "hierarchy", 1.0),
    ],
)
def test_settings_that_a_factory_leaves_without_effect(made: str, setting: str, value) -> None:
    factory = {"optimizer": torch.optim.Adam, "scheduler": SCHEDULERS["cosine"]}[made]
    with pytest.raises(ConfigError, match=f"^{setting}: expected"):
        Trainer(build(), {"t": Task(train=data())}, TrainConfig(**{setting: value}), **{made: factory})


def test_what_is_packed_comes_back() -> None:
    value = {
        "a": [1, 2.5, float("inf"), None, True, "x"],
        "b": (torch.arange(3), {3: "three", "c": Counter({2: 4})}),
        "d": 0.1 + 0.2,
    }
    kept: dict[str, Tensor] = {}
    found = unpack(pack(value, kept, "v"), kept)
    assert torch.equal(found["b"][0], value["b"][0])
    assert found["b"][1] == value["b"][1] and isinstance(found["b"][1]["c"], Counter)
    assert (found["a"], found["d"], type(found["b"])) == (value["a"], value["d"], tuple)
    with pytest.raises(ConfigError, match=r"v\.1: expected keys that JSON holds, got tuple"):
        pack([0, {(1, 2): 3}], {}, "v")


# ------------------------------------------------------------------------------------------------------- fp16


def test_fp16_learns_and_resumes_bit_equal(tmp_path) -> None:
    settings = {"amp": "fp16", "clip_norm": 1.0, "accumulate": 2, "epochs": 6}
    whole = build(dropout=0.3)
    result = trainer(whole, **settings).fit()["t"]
    assert result.val["accuracy"] > 0.8
    loss, _ = stopping(7)
    with pytest.raises(TrainingInterrupted):
        trainer(build(dropout=0.3), tmp_path, loss, **settings).fit()
    model = build(dropout=0.3)
    found = trainer(model, tmp_path, loss, **settings).fit()["t"]
    assert equal(tensors(whole), tensors(model)) and found.history == result.history


def run_of(model, loss, **settings):
    from taps_ext.train.log import Log
    from taps_ext.train.run import Run

    made = trainer(model, loss=loss, **settings)
    task = made.tasks["t"]
    run = Run(model, "t", task, made.config, *made._data("t", task))
    return run, Log(None, "t", 1, quiet=True)


def test_overflow_is_the_scales_business(tmp_path) -> None:
    """A scale of 2^20 overflows fp16's gradients until it has found its place: no step is a bad one, nothing is said,
    and what a step wrote that was left out is as it was before."""
    from taps_ext.train.interrupt import Stop

    model = build(FullConfig())
    run, log = run_of(model, F.cross_entropy, amp="fp16", bad_steps=0, lr=1e-4)
    run.stepper.scaler.inner = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    scales, statistics = [], []
    step, leave_out = run.stepper.step, run.guard.leave_out

    def stepped() -> None:
        scales.append(run.stepper.scaler.inner.get_scale())
        step()

    def left_out(parameters) -> None:
        leave_out(parameters)
        assert all(p.grad is None for p in parameters)
        statistics.append([b.clone() for b in run.state.buffers()])

    run.stepper.step, run.guard.leave_out = stepped, left_out
    before = [b.clone() for b in run.state.buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.train_epoch(log, Stop())
    assert len(statistics) >= 1 and len(scales) + len(statistics) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, statistics[0], strict=True))
    assert set(scales) == {2.0 ** (20 - len(statistics))} and run.guard.bad == 0


def test_at_the_smallest_scale_the_layer_is_named() -> None:
    """A gradient that is Inf at any scale: the scale falls to 1, then the steps are bad ones, and the run stops."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = F.cross_entropy(Broken.apply(outputs) if outputs.requires_grad else outputs, targets)
        assert torch.isfinite(found)
        return found

    with (
        pytest.warns(UserWarning, match=r"the gradient of task 't': parts\./\S+ is not finite.* the step was left out"),
        pytest.raises(
            TapsError, match=r"the gradient of task 't': parts\./\S+ is not finite.*; after 4 such steps in a"
        ),
    ):
        trainer(build(), loss=loss, amp="fp16", epochs=20).fit()
    model = build()
    run, _ = run_of(model, loss, amp="fp16")
    run.stepper.scaler.inner = torch.amp.GradScaler("cpu", init_scale=4.0)
    for expected, off in ((2.0, True), (1.0, True), (FLOOR, False), (FLOOR, False)):
        run.optimizer.zero_grad()
        run._gradients([next(iter(run.batches.epoch(0)))])
        run.stepper.scaler.unscale()
        assert run.stepper.scaler.backed_off() is off
        assert run.stepper.scaler.inner.get_scale() == expected


def test_bad_steps_count_in_a_row() -> None:
    """Every second step is a bad one: with one allowed the run goes on to its end; two of three are too many."""

    def nans(bad):
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            taken.append(int(torch.is_grad_enabled()))
            return F.cross_entropy(outputs, targets) * (math.nan if taken[-1] and bad(sum(taken)) else 1.0)

        return loss

    taken: list[int] = []
    with pytest.warns(UserWarning, match="the training loss is not finite; the step was left out"):
        trainer(build(), loss=nans(lambda step: step % 2 == 0), bad_steps=1).fit()
    assert sum(taken) == 24
    taken.clear()
    with pytest.warns(UserWarning), pytest.raises(DivergedError, match="after 2 such steps in a row the run stops"):
        trainer(build(), loss=nans(lambda step: step % 3), bad_steps=1).fit()
    assert sum(taken) == 2


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_bad_steps_in_a_row_are_counted_over_a_stop(mode: str, tmp_path) -> None:
    """Steps 3 to 5 are bad, of which two are allowed; stopped after the fourth, the run ends all the same."""
    taken: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        taken.append(int(torch.is_grad_enabled()))
        if taken[-1] and sum(taken) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, targets) * (math.nan if taken[-1] and 3 <= sum(taken) <= 5 else 1.0)

    for error in (TrainingInterrupted, DivergedError):
        with pytest.warns(UserWarning), pytest.raises(error):
            trainer(build(), tmp_path, loss, bad_steps=2, warmup_epochs=9).fit(mode)
    assert sum(taken) == 5


def test_the_scale_doubles_after_good_steps_in_a_row() -> None:
    """Of 2000, here of two: a step of no gradients is none of them."""
    model = build(FullConfig())
    run, _ = run_of(model, F.cross_entropy, amp="fp16")
    run.stepper.scaler.inner = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    batch = next(iter(run.batches.epoch(0)))
    for empty, expected in ((False, 4.0), (True, 4.0), (False, 8.0), (False, 8.0), (False, 16.0)):
        run.optimizer.zero_grad(set_to_none=True)
        if not empty:
            run._gradients([batch])
        run.stepper.scaler.unscale()
        run.stepper.step()
        assert run.stepper.scaler.inner.get_scale() == expected


def test_the_scale_goes_on_where_it_was(tmp_path) -> None:
    """Its value and how many good steps it has seen are of the state."""
    runs = [run_of(build(FullConfig()), F.cross_entropy, amp="fp16")[0] for _ in range(2)]
    runs[0].stepper.scaler.inner = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
    batch = next(iter(runs[0].batches.epoch(0)))

    def step(run) -> float:
        run.optimizer.zero_grad(set_to_none=True)
        run._gradients([batch])
        run.stepper.scaler.unscale()
        run.stepper.step()
        return run.stepper.scaler.inner.get_scale()

    assert [step(runs[0]) for _ in range(2)] == [4.0, 4.0]
    parent = runs[0].model.fingerprint()
    runs[0].save(tmp_path / "t.state", {}, parent)
    runs[1].load(tmp_path / "t.state", {}, parent)
    assert [step(run) for run in runs] == [8.0, 8.0] and equal(tensors(runs[0].model), tensors(runs[1].model))


def test_overflow_in_joint_training_leaves_all_as_it_was() -> None:
    from taps_ext.train.joint import JointRun

    model, jobs = model_of().train(), joint_tasks()
    made = Trainer(model, jobs, joint_config(amp="fp16"), quiet=True)
    pairs = {name: made._data(name, task) for name, task in jobs.items()}
    run = JointRun(model, jobs, made.config, *({name: pair[i] for name, pair in pairs.items()} for i in range(2)))
    run.stepper.scaler.inner = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {key: value.clone() for key, value in values(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run._step(("a", "b"), 5) == {} and run.guard.bad == 0
    assert same(before, values(model)) and run.stepper.scaler.inner.get_scale() == 2.0**39
    assert all(p.grad is None for p in run.stepper.parameters)


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    """The global norm after clipping is the bound, whatever the scale was."""
    model = build(FullConfig())
    run, _ = run_of(model, F.cross_entropy, amp="fp16", clip_norm=1e-3)
    run._gradients([next(iter(run.batches.epoch(0)))])
    run.stepper.scaler.unscale()
    run.stepper.clip()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in run.stepper.parameters if p.grad is not None]))
    assert 0.99e-3 < float(norm) <= 1.000001e-3  # clip divides by norm + 1e-6


def test_fp16_in_joint_training(tmp_path) -> None:
    def fit(model, out=None, loss=F.cross_entropy) -> None:
        tasks = {n: Task(train=t.train, val=t.val, loss=loss) for n, t in joint_tasks().items()}
        Trainer(model, tasks, joint_config(out, amp="fp16", clip_norm=1.0), quiet=True).fit("joint")

    whole, model = model_of(), model_of()
    fit(whole)
    loss, _ = stopping(7)
    with pytest.raises(TrainingInterrupted):
        fit(model_of(), tmp_path, loss)
    fit(model, tmp_path, loss)
    assert same(values(whole), values(model))


def test_half_precision_parameters_are_refused_under_fp16() -> None:
    with pytest.raises(ConfigError, match='amp: expected trained parameters of float32 with "fp16", got float16'):
        trainer(build(FullConfig()).half(), amp="fp16").fit()
