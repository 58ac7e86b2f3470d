"""What the Trainer says of data and arguments that it cannot use, and that nothing learned is lost over them."""

from __future__ import annotations

import os
import signal
import warnings
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle
from test_trainer import build, data, equal, fit, tensors
from torch import Tensor, nn
from torch.utils.data import Dataset

from taps_ext import BypassedLayerError, ConfigError, FullConfig, TapsConfig, TapsError, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.run import Run


class Items(Dataset):
    """A map-style dataset of whatever `item` makes of an input and a label."""

    def __init__(self, item, samples: int = 32, seed: int = 0) -> None:
        self.x, self.labels = data(samples, seed)
        self.item = item

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.item(self.x[index], int(self.labels[index]))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            lambda x, y: {"image": x, "label": y},
            r"expected inputs by the names that the base's forward takes, got \['image'\]",
        ),
        (lambda x, y: (x, y, y), r"expected items \(input, target\), got 3 values"),
        (lambda x, y: x, r"expected items \(input, target\), got Tensor"),
        (lambda x, y: ({"x": "cat"}, y), "expected a tensor as the input of an item, got builtins str"),
        (lambda x, y: (x, "cat"), "expected a number or tensor as the target of an item, got 'cat'"),
        (lambda x, y: (x, torch.tensor(y, dtype=torch.int32)), r"expected int64 labels \[B\], got torch.int32 \[16\]"),
        (lambda x, y: (x, torch.tensor([y])), r"expected int64 labels \[B\], got torch.int64 \[16, 1\]"),
        (lambda x, y: (x, float(y)), r"expected int64 labels \[B\] or probabilities \[B, 4\], got torch.float"),
        (lambda x, y: (x, y + 1), r"expected labels from 0 to 3 \(the head\), got 4"),
        (lambda x, y: (x, y - 1), r"expected labels from 0 to 3 \(the head\), got -1"),
    ],
)
def test_items_that_cannot_be_used(item, message: str) -> None:
    with pytest.raises(ConfigError, match=r"tasks\['t'\]\.train: " + message):
        fit(build(), task={"train": Items(item), "val": data(16, 2)})


def test_pictures_without_a_transform() -> None:
    image = pytest.importorskip("PIL.Image")
    items = Items(lambda x, y: (image.new("RGB", (8, 8)), y))
    with pytest.raises(ConfigError, match="expected a tensor as the input of an item, got PIL Image; give the dataset"):
        fit(build(), task={"train": items, "val": data(16, 2)})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_are_checked_before_training(split: str) -> None:
    """Also those that a dataset keeps in a list, as torchvision's do."""
    items = Items(lambda x, y: (x, y))
    items.targets = [*items.labels.tolist()[:-1], 4]
    model = build()
    before = tensors(model)
    with pytest.raises(ConfigError, match=rf"tasks\['t'\]\.{split}: expected labels from 0 to 3 \(the head\), got 4"):
        fit(model, task={"train": data(), "val": data(16, 2), "test": data(16, 3), split: items})
    assert equal(tensors(model), before)


def test_pairs_of_arrays_and_what_is_no_pair() -> None:
    x, y = data(32)
    both, mixed = build(), build()
    fit(both, task={"train": (x, y), "val": data(16, 2)})
    fit(mixed, task={"train": (x.numpy(), y), "val": (data(16, 2)[0], np.asarray(data(16, 2)[1]))})
    assert equal(tensors(both), tensors(mixed))
    for bad, got in (({"x": x, "y": y}, "got dict"), ((x.tolist(), y), "got tuple of list, Tensor")):
        with pytest.raises(ConfigError, match=f"expected a map-style dataset or a pair of tensors, {got}"):
            fit(build(), task={"train": bad})


def test_nan_in_the_data_is_not_blamed_on_a_gate() -> None:
    x, y = data(96)
    x[40] = torch.nan
    message = (
        "task 't': epoch 0, batch [0-5]: the training loss is not finite; after 1 such steps in a row the run stops"
    )
    with pytest.raises(TapsError, match=message):
        fit(build(), task={"train": (x, y), "val": data(16, 2)}, bad_steps=0)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where, tmp_path) -> None:
    """The run is the one whose data lacks that batch: weights, statistics, averages and optimizer."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.inf

    calls = []

    def loss(outputs, targets):
        value = F.cross_entropy(outputs, targets)
        calls.append(len(calls))
        if len(calls) == 3:
            return value * torch.nan if where == "loss" else Spoilt.apply(value)
        return value

    settings = {"epochs": 1, "ema": 0.9, "select": "last", "schedule": "constant", "val_fraction": 0.2}
    model = build()
    with pytest.warns(UserWarning, match="task 't': epoch 0, batch 2: .* is not finite.*; the step was left out"):
        fit(model, task={"loss": loss, "val": data(16, 2)}, **settings)
    want = build()
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        before = Run._bad

        def bad(run, value, batches):
            steps.append(run.progress.batch)
            if run.progress.batch != 2:
                return before(run, value, batches)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return before(run, value * torch.nan, batches)

        patch.setattr(Run, "_bad", bad)
        fit(want, task={"val": data(16, 2)}, **settings)
    assert steps == list(range(6)) and equal(tensors(model), tensors(want))
    assert all(bool(t.isfinite().all()) for t in tensors(model).values() if t.is_floating_point())


def test_bad_steps_in_a_row_stop_the_run(tmp_path) -> None:
    """With the last good state on disk."""
    calls = []

    def loss(outputs, targets):
        calls.append(outputs.requires_grad)
        return F.cross_entropy(outputs, targets) * (torch.nan if sum(calls) > 6 else 1.0)

    message = "epoch 1, batch 3: the training loss is not finite; after 4 such steps in a row"
    task = {"loss": loss, "val": data(16, 2)}
    with pytest.raises(TapsError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(build(), task=task, epochs=3, out=str(tmp_path / "bad"), save_every=0.0)
    assert (tmp_path / "bad" / "t.state").exists()


def test_a_warm_up_of_the_learning_rate() -> None:
    config = TrainConfig(epochs=4, lr_warmup=0.5, schedule="constant")
    assert [config.lr_scale(step, 8) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert TrainConfig(epochs=4).lr_scale(0, 8) == 1.0


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_read_by_workers(workers) -> None:
    """In the same order, with the same random numbers in the data set, whoever reads them."""

    class Noisy(torch.utils.data.Dataset):
        def __init__(self):
            self.x, self.targets = data(48)[0], data(48)[1].tolist()

        def __len__(self):
            return 48

        def __getitem__(self, index):
            return self.x[index] + 0.1 * torch.randn(3, 8, 8), self.targets[index]

    model = build()
    fit(model, epochs=2, task={"train": Noisy(), "val": data(16, 2)}, num_workers=workers)
    assert equal(tensors(model), _noisy(tensors(model)))


_NOISY: dict[str, torch.Tensor] = {}


def _noisy(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the first of the runs came to."""
    if not _NOISY:
        _NOISY.update(found)
    return _NOISY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (nn.Linear(2, 2), {}), "model: expected a TaskModel, got Linear"),
        (lambda: (build(), [Task(train=data())]), "tasks: expected a Mapping, got list"),
        (lambda: (build(), {}, {"epochs": 3}), "config: expected a TrainConfig, got dict"),
        (lambda: (build(), {}, TrainConfig(device="gpu")), r"device: expected cpu or cuda\[:N\], got 'gpu'$"),
        (lambda: (build(), {}, TrainConfig(device="cuda:99")), "device: 'cuda:99' is not usable here: "),
        (
            lambda: (build(), {"t": Task(train=data(), labels=["a"])}),
            r"tasks\['t'\]\.labels: expected 4 names .*, got 1",
        ),
    ],
)
def test_arguments_are_named(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(*arguments(), quiet=True).fit()


def test_out_that_is_a_file(tmp_path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match="out: expected a folder"):
            fit(build(), out=str(out))


class Broken(Items):
    """Its last item cannot be read until it is mended."""

    broken = True

    def identity(self) -> list:
        return ["broken" if self.broken else "mended"]

    def __getitem__(self, index: int):
        if self.broken and index == len(self) - 1:
            raise OSError("cannot read image 31")
        return super().__getitem__(index)


def test_a_test_split_that_cannot_be_read_costs_no_training(tmp_path) -> None:
    """The task's file is there all the same, and the next run only tests."""
    task = {"val": data(16, 2), "test": Broken(lambda x, y: (x, y))}
    model = build()
    with pytest.raises(OSError, match="cannot read image 31"):
        fit(model, out=str(tmp_path), task=task)
    assert (tmp_path / "t.taps").exists() and not list(tmp_path.glob("*.state"))
    task["test"].broken = False
    fresh = TaskModel(build().unload(), TapsConfig(lam=0.5))
    fresh.add_task("t", num_classes=4)
    task["loss"] = never = mock.Mock(wraps=F.cross_entropy)
    never.__module__, never.__qualname__ = F.cross_entropy.__module__, F.cross_entropy.__qualname__
    result = fit(fresh, out=str(tmp_path), task=task)
    assert len(never.call_args_list) == 2  # the test split's batches, none of the training's
    assert result.test["accuracy"] > 0.5 and equal(tensors(fresh), tensors(model))
    again = fit(fresh, out=str(tmp_path), task=task)
    assert again.test == result.test


def test_results_are_never_of_an_earlier_run(tmp_path) -> None:
    """Started over and interrupted, the new run goes on and the old result is gone; without a test split, no result."""
    fit(build(), out=str(tmp_path))
    steps = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return F.cross_entropy(outputs, targets)

    loss.__module__, loss.__qualname__ = F.cross_entropy.__module__, F.cross_entropy.__qualname__
    with pytest.raises(TrainingInterrupted):
        fit(build(seed=5), resume=False, out=str(tmp_path), task={"loss": loss})
    again, whole = build(seed=5), build(seed=5)
    fit(again, out=str(tmp_path))
    fit(whole)
    assert equal(tensors(again), tensors(whole))
    assert fit(build(seed=5), out=str(tmp_path), task={"test": None}).test == {}


def test_labels_of_other_shapes_are_the_losss_business() -> None:
    """Dense labels behind a transposed linear head, and uint8 ones: F.cross_entropy takes them."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.body(x))).transpose(1, -1)

    model = TaskModel(Dense(), TapsConfig(lam=0.5))
    model.add_task("t", num_classes=3)
    x, y = torch.randn(32, 5, 6), torch.randint(3, (32, 5))
    metrics = {"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean().item()}
    task = Task(train=(x, y), val=(x, y), metrics=metrics)
    assert Trainer(model, {"t": task}, TrainConfig(epochs=1, batch_size=8), quiet=True).fit()["t"].epoch == 0
    with pytest.raises(ConfigError, match="expected labels from 0 to 2"):
        Trainer(model, {"t": Task(train=(x, y + 1), metrics=metrics)}, TrainConfig(epochs=1), quiet=True).fit()
    narrow = data()[0], data()[1].to(torch.uint8)
    assert fit(build(), epochs=1, task={"train": narrow, "val": narrow, "test": None}).epoch == 0


class Auxiliary(nn.Module):
    """A head that only training runs, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = nn.Linear(6, 6), nn.Linear(6, 3)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


def test_what_only_training_runs() -> None:
    model = TaskModel(Auxiliary(), TapsConfig(lam=0.5), head_module="fc")
    model.add_task("t", num_classes=3)
    x = torch.randn(4, 6)
    with pytest.raises(BypassedLayerError, match=r"aux, .*only training runs them \(auxiliary heads\)"):
        model.eval()(x, task="t")
    model.train()(x, task="t").sum().backward()
    assert model.eval()(x, task="t").shape == (4, 3)


def test_labels_of_a_saved_task(tmp_path) -> None:
    model = build()
    with pytest.raises(ConfigError, match="labels: expected 4 names .*, got 2"):
        model.save_task("t", tmp_path / "t.taps", labels=["x", "y"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="label"):
        model.save_task("t", tmp_path / "t.taps", label=["x"] * 4)


def test_mistakes_of_the_first_minutes() -> None:
    model = build()
    with pytest.raises(ConfigError, match="base: expected the bare model, got a TaskModel"):
        TaskModel(model)
    model.eval()
    with pytest.raises(TypeError, match="input: expected a tensor, got ndarray"):
        model(data()[0].numpy(), task="t")
    base = model.unload()
    with pytest.raises(TapsError, match="was unloaded"):
        model(data()[0], task="t")
    assert F.softmax(base(data()[0]), 1).shape[1] == settle(TinyNet()).fc.out_features


class Words(nn.Module):
    """A text model as transformers' are: inputs by keyword, logits in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mask = attention_mask[..., None].float()
        pooled = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.classifier(torch.relu(self.hidden(pooled))))


@pytest.mark.parametrize("form", ["labels inside", "pairs"])
@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_items_may_be_dictionaries(form, mode, tmp_path) -> None:
    """Which letter comes more often: a text model trains, and stopped it goes on as if it had not been."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 16, (96, 6), generator=generator)
    labels = (ids < 8).sum(1).gt(3).long()

    class Texts(Dataset):
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> Any:
            item = {"input_ids": ids[index], "attention_mask": torch.ones(6, dtype=torch.int64)}
            return {**item, "labels": labels[index]} if form == "labels inside" else (item, labels[index])

    torch.manual_seed(0)
    model = TaskModel(Words().eval(), FullConfig())
    model.add_task("t", num_classes=2)
    settings = TrainConfig(epochs=12, batch_size=16, lr=0.5, out=str(tmp_path), num_workers=0)
    result = Trainer(model, {"t": Task(train=Texts(), val=Texts(), test=Texts())}, settings, quiet=True).fit(mode)["t"]
    assert result.test["accuracy"] > 0.9


def test_a_dictionary_without_a_target_is_told() -> None:
    with pytest.raises(ConfigError, match=r"expected one of \['labels', 'label', 'target'\] in a dictionary, got keys"):
        fit(build(), task={"train": Items(lambda x, y: {"pixels": x}), "val": data(16, 2)})
