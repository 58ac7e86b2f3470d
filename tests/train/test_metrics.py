"""Metrics over whole splits: exact whatever the batches are, with targets that are left out."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from test_joint import config as joint_config
from test_joint import model_of, same, values
from test_joint import tasks as joint_tasks
from test_trainer import build, data, equal, fit, tensors
from torch import Tensor, nn

from taps_ext import ConfigError, ProbeConfig, TapsConfig, TaskModel
from taps_ext.train import Callback, Task, TrainConfig, Trainer, accuracy, whole
from taps_ext.train.metrics import weight_of
from taps_ext.train.tokens import token_cross_entropy


class Largest:
    """A metric by the protocol: the largest output of a split, which is no mean of anything."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.value = -math.inf
        self.calls.append("reset")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.value = max(self.value, outputs.max().item())
        self.calls.append("update")

    def compute(self) -> Tensor:
        self.calls.append("compute")
        return torch.tensor(self.value, dtype=torch.float64)


def spread(outputs: Tensor, targets: Tensor) -> float:
    assert outputs.device.type == targets.device.type == "cpu" and len(outputs) == len(targets) == 48
    return outputs.double().std().item()


def evaluated(model: TaskModel, split, size: int, **task) -> dict[str, float]:
    config = TrainConfig(batch_size=size)
    return Trainer(model, {"t": Task(train=data(), **task)}, config, quiet=True).evaluate("t", split)


def test_metrics_of_a_whole_split_do_not_depend_on_its_batches() -> None:
    model = build()
    with torch.no_grad():
        outputs = model.eval()(data(48, 1)[0], task="t")
    largest = Largest()
    metrics = {"spread": whole(spread), "largest": largest, "accuracy": accuracy}
    found = [evaluated(model, data(48, 1), size, metrics=metrics) for size in (48, 7, 1)]
    right = (outputs.argmax(1) == data(48, 1)[1]).sum().item()
    for one in found:
        # one image in a batch may be rounded otherwise than many: 24 products and sums of a head's row, each eps / 2
        assert one["spread"] == pytest.approx(outputs.double().std().item(), rel=1e-5)
        assert one["largest"] == pytest.approx(outputs.max().item(), rel=1e-5)
        assert one["accuracy"] == right / 48
    assert largest.calls[1:].count("compute") == 3 and largest.calls[-1] == "reset"


def test_accuracy_of_a_split_is_a_count() -> None:
    """7 of 49 in batches of 49: no rounding of a mean in float32 comes in between."""
    model = TaskModel(nn.Sequential(nn.Linear(3, 3), nn.Identity()), ProbeConfig(), head_module="1")
    model.add_task("t", head=nn.Identity())
    with torch.no_grad():
        model.base[0].weight.copy_(torch.eye(3))
        model.base[0].bias.zero_()
    x = torch.eye(3)[torch.zeros(49, dtype=torch.int64)]
    y = torch.ones(49, dtype=torch.int64)
    y[:7] = 0
    for size in (49, 5):
        assert evaluated(model, (x, y), size)["accuracy"] == 7 / 49


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)], ids=["[B]", "[B, T]", "[B, H, W]"])
def test_what_is_ignored_is_left_out_exactly(shape: tuple[int, ...]) -> None:
    """Loss and accuracy of a split, in float64, against one computation over all that counts."""
    torch.manual_seed(0)
    outputs = torch.randn(12, 3, *shape, dtype=torch.float64)
    targets = torch.randint(0, 3, (12, *shape))
    targets[torch.rand(targets.shape) < 0.4] = -100
    targets[4:6] = -100  # a batch in which nothing counts
    kept = targets != -100
    right = ((outputs.argmax(1) == targets) & kept).sum().item()
    assert accuracy(outputs, targets) == right / kept.sum().item()
    assert math.isnan(accuracy(outputs, torch.full_like(targets, -100)))
    model = TaskModel(nn.Sequential(nn.Identity(), nn.Identity()).double(), ProbeConfig(), head_module="1")
    model.base.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    model.add_task("t", head=nn.Identity())
    for size in (2, 5, 12):
        found = evaluated(model, (outputs, targets), size)
        assert found["accuracy"] == right / kept.sum().item()
        # at most 12 means are weighted and added: 2 roundings each, of values of the loss's size
        assert found["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=30 * 2.0**-53)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (F.cross_entropy, 6),
        (nn.CrossEntropyLoss(), 6),
        (functools.partial(F.cross_entropy, label_smoothing=0.1), 6),
        (functools.partial(F.cross_entropy, ignore_index=2), 4),
        (token_cross_entropy, 6),
        (functools.partial(F.cross_entropy, weight=torch.ones(3)), 4),
        (functools.partial(F.cross_entropy, reduction="sum"), 4),
        (lambda outputs, targets: F.cross_entropy(outputs, targets), 4),
    ],
)
def test_what_a_batch_weighs(loss, weight: float) -> None:
    targets = torch.tensor([[0, 2], [1, 2], [-100, 2], [-100, 2]])
    assert weight_of(loss, targets) == weight
    assert weight_of(loss, torch.zeros(5, dtype=torch.int64)) == weight_of(loss, torch.zeros(5)) == 5


def test_ignored_targets_of_accumulated_steps_weigh_nothing() -> None:
    """Batches of 6 accumulated to 24 are one batch of 24, also where they ignore different numbers of targets. In
    float64 but for Deltas and scores: eight steps, of which each rounds them and their momentum to 2^-24."""
    x, y = data(96)
    y = y.clone()
    y[torch.rand(96, generator=torch.Generator().manual_seed(1)) < 0.5] = -100
    results = []
    for batch, accumulate in ((24, 1), (6, 4)):
        model = build(TapsConfig(lam=0.5, norm="frozen")).double()
        settings = {"epochs": 2, "warmup_epochs": 0, "select": "last"}
        split = {"train": (x.double(), y), "val": (data(16)[0].double(), data(16)[1]), "test": None}
        fit(model, batch_size=batch, accumulate=accumulate, task=split, **settings)
        results.append(tensors(model))
    for name, tensor in results[0].items():
        limit = 8 * 2 * 2**-24 * max(1.0, float(tensor.abs().max()))
        assert torch.allclose(tensor, results[1][name], rtol=0, atol=limit), name


def test_a_batch_in_which_nothing_counts_is_passed_over() -> None:
    x, y = data(32)
    model = build(TapsConfig(lam=0.5))
    before = tensors(model)
    task = {"train": (x, torch.full_like(y, -100)), "val": (x, y), "test": None}
    result = fit(model, task=task, epochs=1, warmup_epochs=0, select="last")
    assert equal(before, tensors(model)) and result.history[0]["loss"] == 0.0
    joint = model_of()
    before = values(joint)
    jobs = {n: Task(train=(t.train[0], torch.full_like(t.train[1], -100)), val=t.val) for n, t in joint_tasks().items()}
    Trainer(joint, jobs, joint_config(epochs=1, warmup_epochs=0, select="last"), quiet=True).fit("joint")
    assert same(before, values(joint))


def test_the_loss_of_a_joint_epoch_is_the_mean_over_its_samples() -> None:
    """Batches of 7 and a last one of 5 (a, 40 samples); b, of 24, starts again after 7, 7, 7 and 3."""
    told: dict[str, list[float]] = {"a": [], "b": []}

    class Noting(Callback):
        def on_step(self, run, step, values) -> None:
            for name, losses in told.items():
                losses.append(values[f"{name}_loss"])

    made = Trainer(model_of(), joint_tasks(), joint_config(batch_size=7, epochs=1), quiet=True, callbacks=[Noting()])
    entry = made.fit("joint")["a"].history[0]
    for name, counts in {"a": [7] * 5 + [5], "b": [7, 7, 7, 3, 7, 7]}.items():
        want = sum(loss * n for loss, n in zip(told[name], counts, strict=True)) / sum(counts)
        assert entry[f"{name}_loss"] == pytest.approx(want, rel=1e-14)  # float64 sums of six


def test_metric_objects_are_settings_by_what_they_are_not_by_what_they_saw(tmp_path) -> None:
    class Quiet(Largest):
        def __init__(self, scale: float) -> None:
            self.scale = scale
            self.reset()

        def reset(self) -> None:
            self.value = 0.0

        def update(self, outputs, targets) -> None:
            self.value += self.scale

        def compute(self) -> float:
            return self.value

    one = Quiet(1.0)
    fit(build(), out=str(tmp_path), task={"metrics": {"m": one}})
    one.update(None, None)
    fit(build(), out=str(tmp_path), task={"metrics": {"m": one}})  # used, and still the same setting
    fit(build(), out=str(tmp_path), task={"metrics": {"m": Quiet(1.0)}})
    with pytest.raises(ConfigError, match="started with metrics"):
        fit(build(), out=str(tmp_path), task={"metrics": {"m": Quiet(2.0)}})


def test_metrics_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match=r"metrics\['m'\]: expected a number, got \[1, 2\]"):
        evaluated(
            build(),
            data(16),
            8,
            metrics={"m": whole(lambda outputs, targets: torch.tensor([1.0]))}
            | {"m": type("Listing", (Largest,), {"compute": lambda self: [1, 2]})()},
        )
    with pytest.raises(ConfigError, match="whole: expected a function of outputs and targets, got int"):
        whole(3)
    metric = whole(lambda outputs, targets: 0.0)
    metric.update(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ConfigError, match=r"whole: expected outputs of one shape in all batches, got \[3\] and \[4\]"):
        metric.update(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ConfigError, match="whole: expected outputs to be a tensor, got tuple"):
        metric.update((torch.zeros(2, 3),), torch.zeros(2))


def test_torchmetrics(tmp_path) -> None:
    """Against a computation over the split, as a setting, and beside what is checked of accuracy."""
    classification = pytest.importorskip("torchmetrics.classification")
    model = build()
    with torch.no_grad():
        labels = model.eval()(data(48, 1)[0], task="t").argmax(1)
    y = data(48, 1)[1]
    score = classification.MulticlassF1Score(num_classes=4, average="macro")
    found = evaluated(model, data(48, 1), 7, metrics={"f1": score})
    per_class = [
        2 * ((labels == c) & (y == c)).sum() / ((labels == c).sum() + (y == c).sum()).clamp(min=1) for c in range(4)
    ]
    assert found["f1"] == pytest.approx(torch.stack(per_class).mean().item(), rel=1e-6)
    for _ in range(2):
        fit(build(), out=str(tmp_path), task={"metrics": {"f1": score}})
    with pytest.raises(ConfigError, match="started with metrics"):
        other = classification.MulticlassF1Score(num_classes=4, average="micro")
        fit(build(), out=str(tmp_path), task={"metrics": {"f1": other}})
