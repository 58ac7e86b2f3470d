"""DataLoaders as they are: the same batches in every run of a seed, at any batch of an epoch, whoever reads them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle
from test_trainer import build, data, equal, fit, tensors
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from taps_ext import ConfigError, FullConfig, TapsConfig, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.loader import LoaderBatches, batches_of, identity_of


class Noisy(Dataset):
    """Every sample draws from all three generators, and notes that it was read."""

    def __init__(self, samples: int = 48) -> None:
        self.x, self.targets = data(samples)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        noise = torch.randn(3, 8, 8) + float(np.random.normal()) + random.gauss(0.0, 1.0)
        return self.x[index] + 0.1 * noise, self.targets[index]


def drawing_collate(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x + 0.1 * torch.randn_like(x), y


def whole(x: Tensor, y: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=16)


def all_of(loader: DataLoader, epoch: int = 0, skip: int = 0, **more: Any) -> list[tuple[Any, Any]]:
    return list(batches_of(loader, "train", size=5, train=True, **more).epoch(epoch, skip))


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_a_loader_gives_the_batches_that_it_gives_everybody() -> None:
    """Where nothing is drawn at random: batch size, drop_last, samplers and collate functions of its own."""
    x, y = data(50)
    dataset = TensorDataset(x, y)
    by_label = torch.argsort(y, stable=True).tolist()
    for loader in (
        DataLoader(dataset, batch_size=16),
        DataLoader(dataset, batch_size=16, drop_last=True, num_workers=2),
        DataLoader(dataset, batch_size=8, sampler=by_label),
        DataLoader(dataset, batch_sampler=BatchSampler(by_label, 7, False)),
        DataLoader(dataset, batch_sampler=[[0, 1, 2], [5, 7], [9]], collate_fn=lambda s: default_collate(s[::-1])),
        DataLoader([(x[i : i + 10], y[i : i + 10]) for i in range(0, 50, 10)], batch_size=None),
    ):
        # The batch_sampler's last batch is of a single sample, on which no batch statistic exists.
        expected = [batch for batch in loader if len(batch[1]) > 1]
        assert same(all_of(loader), expected) and same(all_of(loader, epoch=3, skip=1), expected[1:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [2, 7])
def test_stopped_and_resumed_it_is_the_run_that_was_not(workers, at, tmp_path) -> None:
    """At any batch of an epoch, with random numbers in the dataset, in the collate function and in the model."""

    def loaders(count: int) -> dict[str, Any]:
        made = {"batch_size": 12, "collate_fn": drawing_collate, "num_workers": count}
        train = DataLoader(Noisy(), shuffle=True, persistent_workers=count > 0, **made)
        return {"train": train, "val": DataLoader(Noisy(24), **made), "test": DataLoader(Noisy(24), **made)}

    settings = {"epochs": 3, "accumulate": 2 if at == 7 else 1}
    uncut = build(dropout=0.3)
    reference = fit(uncut, task=loaders(0), **settings)  # in this process: who reads changes nothing
    calls = []

    def stop(inputs: Tensor, generator: torch.Generator) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return inputs

    with pytest.raises(TrainingInterrupted):
        fit(build(dropout=0.3), task={**loaders(workers), "augment": stop}, out=str(tmp_path), **settings)
    again, task = build(dropout=0.3), loaders(workers)
    result = fit(again, task={**task, "augment": stop}, out=str(tmp_path), **settings)
    assert equal(tensors(again), tensors(uncut))
    assert result.history == reference.history and result.test == reference.test


def test_what_was_trained_on_is_not_read_again() -> None:
    noisy = Noisy()
    batches = batches_of(DataLoader(noisy, batch_size=12, shuffle=True), "train", size=5, seed=3, train=True)
    every = list(batches.epoch(2))
    before = list(noisy.read)
    noisy.read.clear()
    assert same(list(batches.epoch(2, skip=3)), every[3:])
    assert noisy.read == before[36:] and sorted(before) == list(range(48))
    assert not same(list(batches.epoch(3)), every)


def test_in_a_joint_run(tmp_path, monkeypatch) -> None:
    """Tasks with loaders of different lengths, the smaller of which starts again within an epoch."""
    from taps_ext.train.joint import JointRun

    def run(out: str | None) -> TaskModel:
        torch.manual_seed(0)
        model = TaskModel(settle(TinyNet(dropout=0.3)), TapsConfig(lam=0.5))
        tasks = {}
        for name, samples in (("a", 48), ("b", 32)):
            model.add_task(name, num_classes=4)
            loader = DataLoader(Noisy(samples), batch_size=12, shuffle=True, num_workers=1)
            tasks[name] = Task(train=loader, val=data(16, 2))
        Trainer(model, tasks, TrainConfig(epochs=2, out=out, warmup_epochs=1), quiet=True).fit("joint")
        return model

    expected = run(None)
    step, count, train = JointRun._step, [], JointRun.train_epoch

    def stepped(run, *args) -> None:
        step(run, *args)
        count.append(1)
        if len(count) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(JointRun, "_step", stepped)
    with pytest.raises(TrainingInterrupted):
        run(str(tmp_path))
    again = run(str(tmp_path))
    assert train is JointRun.train_epoch and len(count) == 8
    for name in "ab":
        one, other = again.state(name).state_dict(), expected.state(name).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in other)


class ByEpoch:
    """A sampler of a user's that knows its epoch."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng(self.epoch).permutation(self.size).tolist())


class Drifting(ByEpoch):
    """One that goes on drawing from where it was."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.chance = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.chance.permutation(self.size).tolist())


class Global(ByEpoch):
    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        random.shuffle(order)
        return iter(order)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda dataset: WeightedRandomSampler(torch.rand(48).tolist(), 30),
        lambda dataset: RandomSampler(dataset, generator=torch.Generator().manual_seed(5)),
        lambda dataset: RandomSampler(dataset, replacement=True, num_samples=100),
        lambda dataset: ByEpoch(48),
        lambda dataset: Global(48),
    ],
    ids=["weighted", "generator", "replacement", "set_epoch", "global"],
)
def test_samplers_of_all_kinds_can_be_resumed(sampler) -> None:
    """Every epoch is another, and the same in a second run, whatever was drawn before."""
    dataset = TensorDataset(*data(48))
    torch.manual_seed(0)
    kept = sampler(dataset)

    def loader() -> DataLoader:
        return DataLoader(dataset, batch_size=10, sampler=kept)

    first = all_of(loader(), 0), all_of(loader(), 1)
    assert not same(*first)
    torch.manual_seed(77)
    np.random.seed(5)
    assert same(all_of(loader(), 1), first[1]) and same(all_of(loader(), 1, skip=2), first[1][2:])
    assert same(all_of(loader(), 0), first[0])


def test_what_samples_draw_depends_on_the_epoch() -> None:
    """And on the batch, where the samples are in the same order in each epoch: in the dataset and in collate."""
    for loader in (
        DataLoader(Noisy(), batch_size=12),
        DataLoader(TensorDataset(*data(48)), batch_size=12, collate_fn=drawing_collate),
    ):
        assert not any(torch.equal(x, y) for (x, _), (y, _) in zip(all_of(loader, 0), all_of(loader, 1), strict=True))
        batches = all_of(loader, 0)
        assert not torch.equal(batches[0][0] - loader_x(loader, 0), batches[1][0] - loader_x(loader, 1))


def test_what_a_sample_of_a_dataset_draws_does_not_depend_on_its_batch() -> None:
    """Each draws its own, the same in batches of any size."""
    noise = []
    for size in (48, 7):
        batches = batches_of(Noisy(), "val", size=size)
        x = torch.cat([x for x, _ in batches.epoch(0)])
        noise.append(x - data(48)[0])
    assert torch.equal(*noise)
    assert len({tuple(sample.flatten().tolist()) for sample in noise[0]}) == 48
    assert len({round(float(sample.std()), 6) for sample in noise[0]}) == 48  # not one drawing, rounded


def loader_x(loader: DataLoader, index: int) -> Tensor:
    x = loader.dataset.x if isinstance(loader.dataset, Noisy) else loader.dataset.tensors[0]
    return x[12 * index :][:12]


def test_generators_of_the_run_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        all_of(DataLoader(Noisy(), batch_size=12, shuffle=True, num_workers=workers))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_generators_of_the_loader_are_left_alone() -> None:
    """What else draws from them is not disturbed, and need not be told."""
    own = [torch.Generator().manual_seed(seed) for seed in range(2)]
    before = [generator.get_state() for generator in own]
    sampler = RandomSampler(Noisy(), generator=own[0])
    all_of(DataLoader(Noisy(), batch_size=12, sampler=sampler, generator=own[1]))
    assert all(torch.equal(generator.get_state(), state) for generator, state in zip(own, before, strict=True))


class Endless(ByEpoch):
    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(torch.randint(self.size, ()))


class OwnLoader(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            lambda d: DataLoader(d, sampler=Drifting(96)),
            "the same batches when it is seeded alike.*BatchSampler do",
        ),
        (
            lambda d: DataLoader(d, sampler=Endless(96)),
            r"a sampler with a length.*give Task\(batches_per_epoch",
        ),
        (lambda d: OwnLoader(d), "expected a DataLoader that iterates as torch's does, got OwnLoader"),
        (lambda d: DataLoader(d, num_workers=2, in_order=False), "expected a DataLoader with in_order=True"),
        (
            lambda d: DataLoader(d, batch_size=100, drop_last=True),
            r"expected at least one batch, got none of 96 samples \(batch_size = 100, drop_last = True\)",
        ),
        (lambda d: DataLoader(d, batch_size=None), r"batch_size=None the dataset gives batches"),
        (lambda d: DataLoader(d, collate_fn=lambda s: 3), r"expected batches \(inputs, targets\), got int"),
        (lambda d: DataLoader(d, collate_fn=lambda s: (1, 2, 3)), r"batches \(inputs, targets\), got 3 values"),
        (
            lambda d: DataLoader(d, collate_fn=lambda s: (s[0][0][None], ["a"])),
            "a tensor of targets in a batch, got list",
        ),
        (
            lambda d: DataLoader(d, collate_fn=lambda s: ("a", s[0][1][None])),
            "as the input of a batch, got builtins str",
        ),
        (
            lambda d: DataLoader(d, collate_fn=lambda s: {"a": s[0][0][None], "labels": s[0][1][None]}),
            r"expected inputs by the names that the base's forward takes, got \['a'\]",
        ),
    ],
)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_loaders_that_cannot_be_used(loader, message, split) -> None:
    """They are named before anything is trained, whichever split they are for."""
    model = build()
    before = tensors(model)
    if split != "train":
        message = message.replace(r".*give Task\(batches_per_epoch", "")
    with pytest.raises(ConfigError, match=rf"tasks\['t'\]\.{split}: .*{message}"):
        fit(model, task={"train": data(), "val": data(16, 2), split: loader(TensorDataset(*data()))})
    assert equal(tensors(model), before)


def test_a_loader_brings_its_validation_split() -> None:
    loader = whole(*data())
    with pytest.raises(ConfigError, match=r"tasks\['t'\]\.val: expected a validation split.*a DataLoader and no val"):
        fit(build(), task={"train": loader})
    for count in (0, True, 2.0):
        with pytest.raises(ConfigError, match="batches_per_epoch: expected an int >= 1 or None"):
            Task(train=loader, batches_per_epoch=count)
    with pytest.raises(ConfigError, match=r"batches_per_epoch: expected None for tasks\['t'\].train, a dataset with"):
        fit(build(), task={"train": data(), "batches_per_epoch": 3})
    with pytest.raises(ConfigError, match=r"batches_per_epoch: expected at most the 6 of tasks\['t'\].train, got 7"):
        fit(build(), task={"train": loader, "val": data(16, 2), "batches_per_epoch": 7})


def test_an_epoch_may_have_fewer_batches() -> None:
    """Also of a sampler without an end."""
    dataset = TensorDataset(*data(48))
    for loader in (DataLoader(dataset, batch_size=8), DataLoader(dataset, batch_size=8, sampler=Endless(48))):
        steps: list[int] = []
        task = {"train": loader, "val": data(16, 2), "test": None, "batches_per_epoch": 3}
        fit(build(), epochs=2, task={**task, "augment": lambda x, generator, s=steps: (s.append(len(x)), x)[1]})
        assert steps == [8] * 6


def test_a_sampler_with_more_batches_in_one_epoch_than_in_another() -> None:
    class Growing(ByEpoch):
        def __iter__(self) -> Iterator[int]:
            return iter(range(16 + 16 * self.epoch))

        def __len__(self) -> int:
            return 16 + 16 * self.epoch

    loader = DataLoader(TensorDataset(*data(48)), batch_size=8, sampler=Growing(48))
    with pytest.raises(ConfigError, match=r"expected 2 batches in every epoch, as in the first, got 4 in epoch 1"):
        fit(build(), epochs=2, task={"train": loader, "val": data(16, 2)})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_last_batch_of_one_sample_is_left_out_of_training_alone(workers) -> None:
    """A batch norm has no statistics of it. In evaluation it counts."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.fc = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.norm(self.body(x))))

    x, y = torch.randn(17, 6), torch.arange(17) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=8, num_workers=workers)
    model = TaskModel(Flat(), FullConfig())
    model.add_task("t", num_classes=3)
    sizes: dict[bool, list[int]] = {True: [], False: []}

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes[outputs.requires_grad].append(len(targets))
        return F.cross_entropy(outputs, targets)

    Trainer(model, {"t": Task(train=loader, val=loader, loss=loss)}, TrainConfig(epochs=1), quiet=True).fit()
    assert sizes == {True: [8, 8], False: [8, 8, 1]}
    # Where every batch is of one sample, the model is what decides.
    ones = DataLoader(TensorDataset(x, y), batch_size=1)
    message = "task 't': expected batches of two samples or more, of which a batch norm has statistics.*drop_last=True"
    with pytest.raises(ConfigError, match=message):
        Trainer(model, {"t": Task(train=ones, val=(x, y))}, TrainConfig(epochs=1), quiet=True).fit()
    assert len(all_of(ones)) == 17


def test_what_tells_one_loader_from_another() -> None:
    x, y = data(48)

    def of(x: Tensor = x, **options: Any) -> Any:
        loader = DataLoader(TensorDataset(x, y), **{"batch_size": 8, **options})
        return identity_of(loader, "train", size=1, workers=0)

    assert of() == of(num_workers=2, pin_memory=False) == of(sampler=range(48))
    others = [
        of(x + 1),
        of(shuffle=True),
        of(batch_size=9),
        of(drop_last=True, sampler=range(47)),
        of(collate_fn=drawing_collate),
        of(sampler=WeightedRandomSampler([1.0] * 48, 48)),
    ]
    assert len({str(found) for found in [of(), *others]}) == 7
    assert of(shuffle=True) == of(shuffle=True)
    large = [[torch.arange(2000)], [torch.arange(2000).index_fill(0, torch.tensor([1000]), 7)]]
    one, two = (of(batch_sampler=found, batch_size=1) for found in large)
    assert one != two  # which torch would not print in full
    one, two = (of(shuffle=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert one == two  # a generator is seeded anew


def test_another_loader_is_another_run(tmp_path) -> None:
    task = {"val": data(16, 2), "test": None}
    fit(build(), out=str(tmp_path), task={"train": whole(*data()), **task})
    again = fit(build(), out=str(tmp_path), task={"train": whole(*data()), **task})
    assert len(again.history) == 4
    with pytest.raises(ConfigError, match="started with data.train"):
        fit(build(), out=str(tmp_path), task={"train": DataLoader(TensorDataset(*data()), batch_size=15), **task})
    with pytest.raises(ConfigError, match="started with batches_per_epoch = None, got 4"):
        fit(build(), out=str(tmp_path), task={"train": whole(*data()), "batches_per_epoch": 4, **task})


# ---------------------------------------------------------------------------------------------------- workers


class Told(Noisy):
    """Says who read a sample, in its input."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, 8, 8), float(os.getpid())), self.targets[index]


def readers(batches: Any, epochs: int) -> list[set[float]]:
    return [{float(x[0, 0, 0, 0]) for x, _ in batches.epoch(epoch)} for epoch in range(epochs)]


def test_workers_live_from_epoch_to_epoch() -> None:
    """Those of a dataset, and those of a loader that says so."""
    dataset = batches_of(Told(), "train", size=8, workers=2, train=True)
    one, two = readers(dataset, 2)
    assert one == two and len(one) == 2 and os.getpid() not in one
    for keep in (True, False):
        loader = DataLoader(Told(), batch_size=8, num_workers=2, persistent_workers=keep)
        one, two = readers(batches_of(loader, "train", size=1, train=True), 2)
        assert (one == two) is keep and len(one | two) == (2 if keep else 4)


class Failing(Noisy):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def __getitem__(self, index: int) -> Any:
        if index == 40 and get_worker_info() is not None:
            self.how()
        return super().__getitem__(index)


def _raise() -> None:
    raise OSError("cannot read image 40")


def _die() -> None:
    time.sleep(0.2)  # what it has sent by then has arrived: torch waits for a reader that died in between
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("form", "how", "error", "message"),
    [
        ("dataset", _raise, OSError, r"in DataLoader worker process(.|\n)*cannot read image 40"),
        ("loader", _raise, OSError, r"in DataLoader worker process(.|\n)*cannot read image 40"),
        ("loader", _die, RuntimeError, r"DataLoader worker \(pid.*\) (exited unexpectedly|is killed)"),
    ],
)
def test_an_error_in_a_worker_is_the_runs(form, how, error, message) -> None:
    """Of the type that it had, with where it was raised; and no worker is left, whoever holds the traceback."""
    train = Failing(how)
    task = {"train": train if form == "dataset" else DataLoader(train, batch_size=16, num_workers=2)}
    with pytest.raises(error, match=message) as held:
        fit(build(), task={**task, "val": data(16, 2)}, num_workers=2)
    assert held.tb and not multiprocessing.active_children()


def _init(worker: int) -> None:
    info = get_worker_info()
    info.dataset.x[:] = float(10 + worker)
    info.dataset.drawn = torch.randint(1 << 30, ()).item()


class Inited(Noisy):
    drawn = 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index].clone()
        x[0, 0, 0] = self.drawn
        return x, self.targets[index]


def test_a_worker_is_begun_by_the_loaders_own_function() -> None:
    """`get_worker_info().dataset` is the user's, and what it draws is the same in every run."""

    def read() -> list[Any]:
        loader = DataLoader(Inited(), batch_size=12, num_workers=2, worker_init_fn=_init)
        return [x for x, _ in all_of(loader)]

    one = read()
    assert [float(x[0, 1, 1, 1]) for x in one] == [10.0, 11.0, 10.0, 11.0]
    assert all(torch.equal(a, b) for a, b in zip(one, read(), strict=True))
    assert one[0][0, 0, 0, 0] != one[1][0, 0, 0, 0]


def test_what_a_worker_draws_as_it_begins_does_not_depend_on_what_was_read_before() -> None:
    """A run that is resumed in its second epoch has the workers of one that was not stopped."""
    loader = DataLoader(Inited(), batch_size=12, num_workers=2, worker_init_fn=_init)
    whole, resumed = (batches_of(loader, "train", size=5, train=True) for _ in range(2))
    list(whole.epoch(0))
    assert same(list(whole.epoch(1)), list(resumed.epoch(1)))


def test_batches_are_fetched_at_once_where_a_dataset_can() -> None:
    class AtOnce(Noisy):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            asked.append(indices)
            return [(self.x[index], self.targets[index]) for index in indices]

    asked: list[list[int]] = []
    found = all_of(DataLoader(AtOnce(), batch_size=16))
    assert [len(indices) for indices in asked] == [16, 16, 16]
    assert same(found, all_of(whole(*data(48))))


def test_the_first_batch_is_read_where_the_loader_reads(tmp_path) -> None:
    """A loader whose workers prepare the dataset is not read in this process."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    loader = DataLoader(Inited(), batch_size=12, num_workers=1, worker_init_fn=_init)
    loader.dataset.__class__ = type("OnlyThere", (Inited,), {"__getitem__": _only_there})
    assert fit(build(), epochs=1, task={"train": loader, "val": data(16, 2), "test": None, "loss": loss}).epoch == 0
    assert LoaderBatches(loader, 0, "train", train=True).loader is loader


def _only_there(self: Any, index: int) -> Any:
    assert get_worker_info() is not None
    return Inited.__getitem__(self, index)
