"""Data that can only be read on: how long an epoch is, who draws what, and how a stopped run finds its place."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_loaders import drawing_collate, same
from test_trainer import build, data, equal, fit, tensors
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from taps_ext import ConfigError
from taps_ext.train import Task, TrainConfig, Trainer, TrainingInterrupted
from taps_ext.train.loader import batches_of, identity_of


class Stream(IterableDataset):
    """Samples in an order of chance, with noise, shared out between workers as torch's manual has it."""

    def __init__(self, samples: int = 48, noise: float = 0.1) -> None:
        self.x, self.y = data(samples)
        self.noise = noise

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        mine = list(range(worker, len(self.x), workers))
        if self.noise:
            random.shuffle(mine)
        for index in mine:
            drawn = torch.randn(3, 8, 8) + float(np.random.normal())
            yield self.x[index] + self.noise * drawn, self.y[index]


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.x)


class ByEpoch(Sized):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in super().__iter__():
            yield torch.full_like(x, float(self.epoch)), y


def epochs_of(source: Any, **more: Any) -> Any:
    return batches_of(source, "train", **{"size": 12, "train": True, **more})


def test_without_chance_it_gives_what_it_gives_everybody() -> None:
    found = list(epochs_of(Sized(noise=0.0)).epoch(0))
    assert same(found, list(DataLoader(TensorDataset(*data(48)), batch_size=12)))
    loader = DataLoader(Sized(50, noise=0.0), batch_size=12, num_workers=2, drop_last=True)
    assert same(list(epochs_of(loader).epoch(1)), list(loader))
    pairs = DataLoader(_Batches(), batch_size=None)  # the dataset makes the batches
    assert same(list(epochs_of(pairs, length=2).epoch(0)), list(pairs))


class _Batches(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data(20)
        yield x[:10], y[:10]
        yield x[10:], y[10:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epochs_batches_come_from_the_seed_and_the_epoch(workers) -> None:
    """Whatever persistent_workers says: a worker that lives on would go on drawing from where it was."""
    loader = DataLoader(
        Sized(), batch_size=12, num_workers=workers, persistent_workers=workers > 0, collate_fn=drawing_collate
    )
    first = [list(epochs_of(loader).epoch(epoch)) for epoch in range(2)]
    assert not same(*first)
    torch.manual_seed(9)
    random.seed(9)
    again = epochs_of(loader)
    assert same(list(again.epoch(1)), first[1]) and same(list(again.epoch(1, skip=3)), first[1][3:])
    assert not same(list(epochs_of(loader, seed=1).epoch(1)), first[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_it_is_the_run_that_was_not(workers, tmp_path) -> None:
    def task() -> dict[str, Any]:
        return {
            "train": DataLoader(Stream(), batch_size=12, num_workers=workers),
            "val": DataLoader(Stream(24), batch_size=12, num_workers=workers),
            "test": Stream(24),
            "batches_per_epoch": 4,
        }

    whole = build(dropout=0.3)
    reference = fit(whole, task=task(), epochs=3)
    calls = []

    def stop(inputs: Tensor, generator: torch.Generator) -> Tensor:
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return inputs

    with pytest.raises(TrainingInterrupted):
        fit(build(dropout=0.3), task={**task(), "augment": stop}, out=str(tmp_path), epochs=3)
    again = build(dropout=0.3)
    result = fit(again, task={**task(), "augment": stop}, out=str(tmp_path), epochs=3)
    assert equal(tensors(again), tensors(whole)) and len(calls) == 12
    assert result.history == reference.history and result.test == reference.test


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_is_told_its_epoch(workers) -> None:
    batches = epochs_of(ByEpoch(), workers=workers)
    seen = [{float(x.mean()) for x, _ in batches.epoch(epoch)} for epoch in range(2)]
    assert seen == [{0.0}, {1.0}] and len(batches) == 4


def test_generators_of_the_run_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        assert len(list(epochs_of(Sized(), workers=workers).epoch(0))) == 4
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_how_long_an_epoch_is() -> None:
    val = data(16, 2)
    message = r"tasks\['t'\]\.train: expected to know how many batches an epoch has, got Stream without a length; give "
    for train in (Stream(), DataLoader(Stream(), batch_size=8)):
        with pytest.raises(ConfigError, match=message):
            fit(build(), task={"train": train, "val": val})
    with pytest.raises(ConfigError, match=r"a validation split .*got a Sized and no val"):
        fit(build(), task={"train": Sized()})
    with pytest.raises(ConfigError, match="expected 5 batches in an epoch, as batches_per_epoch says, got 3"):
        fit(build(), task={"train": Stream(), "val": val, "batches_per_epoch": 5})
    with pytest.raises(ConfigError, match="expected 4 batches in an epoch, as its len.. says, got 3"):
        list(epochs_of(_Short(), size=12).epoch(0))
    for empty in (_Short(0), DataLoader(_Short(0), batch_size=8)):
        for split in ("train", "val", "test"):
            where = "data" if split == "test" else split  # which is evaluated after the run
            with pytest.raises(ConfigError, match=rf"{where}: expected at least one batch, got none"):
                fit(build(), epochs=1, task={"train": data(), "val": val, split: empty})


class _Short(Sized):
    def __init__(self, says: int = 48) -> None:
        super().__init__(36 if says else 1, noise=0.0)
        self.x, self.says = self.x[: says and 36], says

    def __len__(self) -> int:
        return self.says


def test_a_longer_stream_is_left_where_the_epoch_ends() -> None:
    """And begun anew in the next; validation reads on to the end."""
    sizes: list[int] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        sizes.append(len(targets))
        return 0.5

    task = {"train": Stream(), "val": Stream(20), "test": None, "batches_per_epoch": 2, "metrics": {"m": metric}}
    fit(build(), epochs=2, task=task, batch_size=8)
    assert sizes == [8, 8, 4] * 2


def test_a_lone_sample_in_front_of_a_batch_norm_is_told() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.fc = torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.norm(self.body(x))))

    class Lines(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter([(torch.randn(6), torch.tensor(index % 3)) for index in range(9)])

    from taps_ext import FullConfig, TaskModel

    model = TaskModel(Flat(), FullConfig())
    model.add_task("t", num_classes=3)
    task = Task(train=Lines(), val=Lines(), batches_per_epoch=3)
    with pytest.raises(ConfigError, match="task 't': expected batches of two samples or more.*drop_last=True"):
        Trainer(model, {"t": task}, TrainConfig(epochs=1, batch_size=4), quiet=True).fit()


def test_what_tells_one_stream_from_another() -> None:
    """How it is put into batches, and by how many workers, between whom the samples are shared out."""

    def of(source: Any, size: int = 8, workers: int = 0) -> str:
        return str(identity_of(source, "train", size=size, workers=workers))

    same_ones = [of(Sized()), of(DataLoader(Sized(), batch_size=8)), of(DataLoader(Sized(), batch_size=8), 3, 3)]
    assert len(set(same_ones)) == 1
    others = [
        of(Sized(), workers=2),
        of(DataLoader(Sized(), batch_size=8, num_workers=1)),
        of(Sized(40)),
        of(Sized(), size=9),
        of(Stream()),
        of(DataLoader(Sized(), batch_size=8, drop_last=True)),
        of(_Named("a")),
        of(_Named("b")),
    ]
    assert len({*same_ones, *others}) == 9


class _Named(Sized):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def identity(self) -> str:
        return self.name


class Counted(Stream):
    """Notes what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for item in super().__iter__():
            self.read += 1
            yield item


def test_states_within_an_epoch_do_not_read_it_again(tmp_path) -> None:
    """A state after every step leaves the stream where it is; so each sample is read once an epoch."""
    plain, saving = build(dropout=0.3), build(dropout=0.3)
    val = data(16, 2)
    fit(plain, task={"train": Counted(), "val": val, "batches_per_epoch": 3}, epochs=2)
    train = Counted()
    fit(saving, task={"train": train, "val": val, "batches_per_epoch": 3}, epochs=2, out=str(tmp_path), save_every=0.0)
    assert train.read == 2 * 3 * 16 and equal(tensors(plain), tensors(saving))


def test_who_leaves_off_reading_leaves_no_workers() -> None:
    batches = epochs_of(Stream(noise=0.0), length=4, workers=2)
    reading = batches.epoch(0)
    next(reading)
    assert len(multiprocessing.active_children()) == 2
    held = batches.reading  # as a traceback may hold it
    reading.close()
    assert held is not None and not multiprocessing.active_children()
