"""What users of the Trainer are told when something is not as it should be: before a run where that can be known, and
by the name of the argument."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle
from test_joint import config as joint_config
from test_joint import model_of as joint_model
from test_joint import tasks as joint_tasks
from test_trainer import build, data, equal, tensors
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Sampler, TensorDataset

from taps_ext import ConfigError, RcmConfig, TapsConfig, TaskModel
from taps_ext.methods import rcm
from taps_ext.train import (
    Callback,
    MultiTask,
    Task,
    TrainConfig,
    Trainer,
    Weighting,
    accuracy,
    register_weighting,
    token_cross_entropy,
    whole,
)


def trained(task: Task | None = None, model: TaskModel | None = None, mode: str = "incremental", **own):
    settings = {key: own.pop(key) for key in list(own) if key not in ("optimizer", "scheduler", "callbacks")}
    config = TrainConfig(**{"epochs": 2, "batch_size": 16, "warmup_epochs": 0, **settings})
    trainer = Trainer(model or build(), {"t": task or Task(train=data(), val=data(48, 1))}, config, quiet=True, **own)
    return trainer.fit(mode)["t"]


def told(run: Callable[[], object]) -> list[str]:
    """What a run warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


class Half:
    def update(self, outputs, targets) -> None: ...

    def compute(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": None}, "loss: expected a function of outputs and targets, or an object of a loss, got NoneType"),
        ({"loss": nn.CrossEntropyLoss}, "loss: expected .*, got the class CrossEntropyLoss"),
        ({"metrics": {1: accuracy}}, "metrics: expected names as text, got 1"),
        (
            {"metrics": {"f": "f1"}},
            r"metrics\['f'\]: expected a function of outputs and targets, or an object .*, got str",
        ),
        ({"metrics": {"f": whole}}, r"metrics\['f'\]: expected .*, got the class whole"),
        ({"metrics": {"f": Half()}}, r"metrics\['f'\]: expected .* with update, compute and reset, got Half"),
    ],
)
def test_what_a_task_cannot_be_made_of(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Task(train=data(), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"loss": nn.CrossEntropyLoss(reduction="none")},
            r"tasks\['t'\].loss: expected a scalar tensor, .* a tensor \[16\]",
        ),
        ({"loss": lambda o, t: 1.5}, r"tasks\['t'\].loss: expected a scalar tensor, a mean over the batch, got 1.5"),
        ({"loss": lambda o, t: F.cross_entropy(o.detach(), t)}, r"tasks\['t'\].loss: .* depends on nothing trained"),
        ({"metrics": {"m": lambda o, t: None}}, r"metrics\['m'\]: expected a number, got None"),
        ({"metrics": {"m": lambda o, t: o.argmax(1) == t}}, r"metrics\['m'\]: expected a number, got tensor\(\[.*"),
        ({"metrics": {"m": lambda o, t: o}}, r"metrics\['m'\]: expected a number, got a tensor \[16, 4\]"),
        (
            {"augment": lambda x, generator: None},
            "augment: expected the inputs of a batch to be returned, got NoneType",
        ),
    ],
)
def test_what_a_run_meets_first(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(Task(train=data(), val=data(48, 1), **given))


def items(samples: int = 32) -> list:
    x, y = data(samples)
    return [({"x": x[i]}, int(y[i])) for i in range(samples)]


class Restless(Sampler):
    def __init__(self) -> None:
        self.own = torch.Generator()

    def __iter__(self):
        return iter(torch.randperm(32, generator=self.own).tolist())

    def __len__(self) -> int:
        return 32


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        (
            iter(items()),
            {},
            "expected a map-style dataset or a pair of tensors, got list_iterator; what can only be read on",
        ),
        (MultiTask([(x, {"t": y}) for x, y in items()]), {}, r"got MultiTask; a task's data are its .task\(name\)"),
        (
            [(torch.zeros(3, 8 + i % 2, 8), i % 4) for i in range(32)],
            {},
            "data: expected samples of a batch to be of one",
        ),
        (
            [{"x": torch.zeros(3), "label": 0, "target": 0}],
            {},
            r"got keys .*, of which \['label', 'target'\] all say so",
        ),
        (
            [{"x": [1, 2], "label": 0}],
            {},
            "got builtins list; give the task a DataLoader with a collate_fn that makes tensors of 'x'",
        ),
        (
            data(2),
            {"val": None},
            "val_fraction: expected both parts of 2 samples non-empty, got 0.1; or give the task a val",
        ),
        (
            items(),
            {"augment": lambda x: x},
            r"augment: expected a function \(inputs, generator\) where inputs are a dict",
        ),
        (
            DataLoader(TensorDataset(*data(32)), 8, sampler=Restless()),
            {},
            "when it is seeded alike, .* Restless in its BatchSampler does not",
        ),
    ],
)
def test_data_that_cannot_be_used(train, more, message) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(Task(**{"train": train, "val": data(48, 1), **more}))


def test_arrays_of_text() -> None:
    with pytest.raises(
        ConfigError, match=r"tasks\['t'\].train: expected arrays that torch has types for: .*numpy.str_"
    ):
        trained(Task(train=(data()[0].numpy(), np.array(["a"] * 96)), val=data(48, 1)))


def test_gradients_that_are_off_are_named() -> None:
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"nothing trained, gradients being switched off \(torch.no_grad"),
    ):
        trained()


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_a_callback_that_leaves_the_model_in_evaluation_mode_changes_nothing(mode) -> None:
    class Looking(Callback):
        def on_step(self, run, step, values) -> None:
            model.eval()

    model, other = build(dropout=0.3), build(dropout=0.3)
    assert trained(model=model, mode=mode, callbacks=[Looking()]).val == trained(model=other, mode=mode).val
    assert equal(tensors(model), tensors(other))


def test_no_tasks() -> None:
    with pytest.raises(ConfigError, match="tasks: expected at least one to train, got none"):
        Trainer(build(), {}).fit()


def test_accuracy_of_tokens_names_what_counts_them() -> None:
    outputs, targets = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    assert token_cross_entropy(outputs, targets) > 0
    with pytest.raises(ConfigError, match="give the task metrics of its own, such as token_accuracy"):
        accuracy(outputs, targets)


def test_a_loss_with_parameters_of_its_own_is_told() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return F.cross_entropy(self.scale * outputs, targets)

    message = "tasks['t'].loss: Scaled has parameters, which are not trained"
    assert any(message in line for line in told(lambda: trained(Task(train=data(), loss=Scaled()))))
    assert not any(
        ".loss" in line for line in told(lambda: trained(Task(train=data(), loss=Scaled().requires_grad_(False))))
    )


@pytest.mark.parametrize(
    ("optimizer", "key"),
    [(lambda groups: Adam(groups, lr=1e-4), "lr"), (lambda groups: AdamW(groups, weight_decay=0.5), "weight_decay")],
)
def test_a_rate_that_groups_override_is_told(optimizer, key) -> None:
    assert [line for line in told(lambda: trained(optimizer=optimizer)) if line.startswith(f"optimizer: {key}=")]


@pytest.mark.parametrize(
    "optimizer",
    [
        Adam,
        lambda groups: SGD(groups, lr=0.01),  # the config's
        lambda groups: AdamW([{**group, "lr": 1e-4} for group in groups], lr=1e-4),
    ],
)
def test_a_rate_that_groups_have_is_no_slip(optimizer) -> None:
    assert not [line for line in told(lambda: trained(optimizer=optimizer)) if line.startswith("optimizer:")]


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_a_scheduler_that_ends_before_the_run_is_said_before_the_first_step(mode) -> None:
    """Six batches an epoch, two epochs: twelve steps are enough, eleven are not."""
    steps: list[int] = []

    class Steps(Callback):
        def on_step(self, run, step, values) -> None:
            steps.append(step)

    def run(total: int) -> None:
        trained(mode=mode, scheduler=lambda o: OneCycleLR(o, 0.1, total_steps=total), callbacks=[Steps()])

    with pytest.raises(
        ConfigError, match="scheduler: expected one of 12 steps or more, .* OneCycleLR with total_steps = 11"
    ):
        run(11)
    assert not steps
    run(12)
    assert steps == list(range(1, 13))


def test_a_scheduler_that_ends_within_another_names_the_argument() -> None:
    class Outer(torch.optim.lr_scheduler.LRScheduler):
        def step(self, epoch=None) -> None:
            if epoch is None and getattr(self, "begun", 0) > 2:
                raise ValueError("no further")
            self.begun = getattr(self, "begun", 0) + 1

    with pytest.raises(
        ConfigError, match="scheduler: expected one that is stepped after every step .* Outer: no further"
    ):
        trained(scheduler=Outer)


@pytest.mark.parametrize(
    "settings", [{"mix": "uniform"}, {"loss_weights": "uncertainty"}, {"loss_weights": {"t": 2.0}}, {"hierarchy": 0.5}]
)
def test_settings_of_joint_training_without_it_are_told(settings) -> None:
    line = (
        f"{next(iter(settings))}: of joint training, without effect with mode='incremental'; did you mean fit('joint')?"
    )
    assert line in told(lambda: trained(**settings))
    assert line not in told(lambda: trained(mode="joint", **settings))


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_epochs_without_a_target_are_told(mode) -> None:
    x, y = data()
    found = told(lambda: trained(Task(train=(x, torch.full_like(y, -100)), val=(x, y)), mode=mode))
    assert sum("took no step" in line for line in found) == 2
    assert not any("took no step" in line for line in told(lambda: trained(mode=mode)))


def test_a_metric_that_is_nan_is_told_where_it_selects() -> None:
    def metrics(*names: str) -> dict:
        known = {"good": accuracy, "bad": lambda outputs, targets: float("nan")}
        return {name: known[name] for name in names}

    def lines(*names: str) -> list[str]:
        return [l for l in told(lambda: trained(Task(train=data(), metrics=metrics(*names)))) if "metrics['bad']" in l]

    assert len(lines("bad", "good")) == 2 and not lines("good", "bad")


def test_a_callback_whose_method_nothing_calls_is_refused() -> None:
    class Late(Callback):
        def on_epoch_end(self, run, values) -> None: ...

    message = (
        r"callbacks: expected methods \[.*\] of Late, got 'on_epoch_end', which nothing calls \(did you mean 'on_epoch'"
    )
    with pytest.raises(ConfigError, match=message):
        trained(callbacks=[Late()])


class Heard(Callback):
    def __init__(self, *fails: str) -> None:
        self.heard: list[str] = []
        self.fails = fails

    def note(self, what: str) -> None:
        self.heard.append(what)
        if what in self.fails:
            raise RuntimeError(what)

    def on_start(self, run) -> None:
        self.note("start")

    def on_end(self, run, results) -> None:
        assert not results
        self.note("end")


def test_every_callback_that_started_is_told_of_the_end() -> None:
    first, broken, last = Heard(), Heard("start"), Heard()
    with pytest.raises(RuntimeError, match="start"):
        trained(callbacks=[first, broken, last])
    assert (first.heard, broken.heard, last.heard) == (["start", "end"], ["start"], [])
    broken, last = Heard("end"), Heard()
    with pytest.raises(RuntimeError, match="end"):
        trained(Task(train=data(), loss=lambda o, t: 1.0), callbacks=[broken, last])
    assert broken.heard == last.heard == ["start", "end"]


def test_weightings_that_cannot_be_made() -> None:
    with pytest.raises(
        ConfigError, match=r'register_weighting: expected a name, as in @register_weighting\("mine"\), got'
    ):
        register_weighting(Weighting)  # type: ignore[arg-type]

    @register_weighting("test mistaken")
    class Mistaken(Weighting):
        def __init__(self) -> None:
            super().__init__([])

    with pytest.raises(ConfigError, match=r"loss_weights: expected Mistaken\(tasks\) to make a Weighting, .*TypeError"):
        Trainer(joint_model(), joint_tasks(), joint_config(loss_weights="test mistaken"), quiet=True).fit("joint")


def test_a_family_in_no_file_is_said_before_the_first_step(tmp_path) -> None:
    """A run whose task could not be written at its end does not begin; with the family saved it does."""
    model = build(RcmConfig(start="response"))
    rcm.initialise(model, rcm.response_basis(model, [data()[0]]))
    message = r"out: task 't' builds on the family 'rcm', which is in no file yet, .* model.save_shared\('rcm', path\)"
    with pytest.raises(ConfigError, match=message):
        trained(model=model, out=str(tmp_path))
    assert not list(tmp_path.glob("metrics.jsonl")) and trained(model=model).file is None
    model.save_shared("rcm", tmp_path / "rcm.shared.taps")
    result = trained(model=model, out=str(tmp_path))
    torch.manual_seed(0)
    other = TaskModel(settle(TinyNet()))
    other.load_task(result.file)
    x = data(48, 1)[0]
    assert torch.equal(other.eval()(x, task="t"), model.eval()(x, task="t"))


LOSSES = [
    F.mse_loss,
    F.l1_loss,
    nn.SmoothL1Loss(),
    nn.HuberLoss(),
    functools.partial(F.mse_loss, reduction="mean"),
    nn.BCEWithLogitsLoss(),
]


def of_one_output() -> TaskModel:
    model = TaskModel(settle(TinyNet()), TapsConfig())
    model.add_task("t", num_classes=1)
    return model


def regression(loss, *shape: int) -> Task:
    """One number for each image."""
    x = data()[0]
    return Task(train=(x, x.mean((1, 2, 3)).reshape(shape)), loss=loss, metrics={})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: re.sub(" at 0x[0-9a-f]+", "", str(loss)))
@pytest.mark.parametrize("mode", ["incremental", "evaluate"])
def test_targets_that_would_be_broadcast_are_refused(loss, mode: str) -> None:
    """[N] against [N, 1] is a mean over all pairs, which trains towards the mean of all targets."""
    model = of_one_output()
    message = (
        r"expected targets \[\d+, 1\] like the outputs, which \w+ compares .*, got \[\d+\]; .* y\.reshape\(-1, 1\)"
    )
    with pytest.raises(ConfigError, match=message):
        if mode == "evaluate":
            task = regression(loss, -1)
            Trainer(model, {"t": task}, TrainConfig(), quiet=True).evaluate("t", task.train)
        else:
            trained(regression(loss, -1), model)
    assert trained(regression(F.mse_loss, -1, 1), model).epoch >= 0


def test_a_loss_of_ones_own_may_reshape() -> None:
    assert told(lambda: trained(regression(lambda o, t: F.mse_loss(o.squeeze(1), t), -1), of_one_output())) == []


@pytest.mark.parametrize("kind", ["tensor", "array", "loader"])
def test_uint8_images_that_the_base_does_not_take(kind: str) -> None:
    x, y = data()
    bytes_ = (x.sigmoid() * 255).to(torch.uint8)
    made = {"tensor": (bytes_, y), "array": (bytes_.numpy(), y.numpy())}
    train = made.get(kind) or DataLoader(TensorDataset(bytes_, y), batch_size=16)
    message = r"task 't': expected images .*, got uint8 \[16, .* \(input: expected dtype .*\); x\.float\(\) / 255"
    with pytest.raises(ConfigError, match=message):
        trained(Task(train=train, val=(bytes_, y)))


def test_uint8_images_that_the_base_takes() -> None:
    class Scaled(TinyNet):
        def forward(self, x):
            return super().forward(x.float() / 255)

    model = TaskModel(settle(Scaled()), TapsConfig())
    model.add_task("t", num_classes=4)
    x, y = data()
    assert trained(Task(train=((x.sigmoid() * 255).to(torch.uint8), y)), model).epoch >= 0
