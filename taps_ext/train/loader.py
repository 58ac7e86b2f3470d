"""Batches of a `DataLoader`, and of data that can only be read on: the same in every run of one seed, at any batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized
from itertools import count, islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..errors import ConfigError
from .fetch import Batch, Epochs, Fetch, Key, Reader, end_workers, settings_of
from .identity import describe
from .multitask import dataset_batches
from .randomness import forked, seed_host
from .task import Task, as_dataset, content_of, identity, pair_of, split_off


def is_loader(data: Any) -> bool:
    """True for a `DataLoader` and for data that can only be read on; False for what :func:`as_dataset` takes."""
    return isinstance(data, (DataLoader, IterableDataset))


def loader_of(data: Any, argument: str, size: int, workers: int) -> DataLoader[Any]:
    """The `DataLoader` that the data is, or the one around data that can only be read on.

    Raises:
        ConfigError: a loader with an iteration of its own, or whose batches come in no order.
    """
    if not isinstance(data, DataLoader):
        return DataLoader(data, batch_size=size, num_workers=workers)
    if type(data).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            f"{argument}: expected a DataLoader that iterates as torch's does, got {type(data).__name__}, whose own "
            "iteration cannot be seeded and resumed; pass a DataLoader over its dataset"
        )
    if not getattr(data, "in_order", True):
        raise ConfigError(f"{argument}: expected a DataLoader with in_order=True, of which a run can be repeated")
    return data


def pair_of_batch(batch: Any, argument: str) -> Batch:
    """(inputs, targets) of what a loader gave.

    Raises:
        ConfigError: no pair; targets that are no tensor, or have no batch dimension.
    """
    pair = pair_of(batch, argument)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        got = f"{len(pair)} values" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise ConfigError(f"{argument}: expected batches (inputs, targets), got {got}")
    inputs, targets = pair
    targets = torch.as_tensor(targets) if isinstance(targets, (np.ndarray, np.generic, int, float)) else targets
    if not isinstance(targets, Tensor):
        raise ConfigError(
            f"{argument}: expected a tensor of targets in a batch, got {type(targets).__name__}; give the DataLoader "
            "another collate_fn"
        )
    if not targets.dim():
        raise ConfigError(
            f"{argument}: expected targets [B, ...], got a single one; with batch_size=None the dataset gives batches"
        )
    return inputs, targets


_END = object()


def _seed(seed: int, epoch: int, train: bool) -> int:
    return hash((seed, epoch, train, 1)) % 2**63


def _sampler(loader: DataLoader[Any]) -> Any:
    """What says which samples are in a batch, or, of a loader with batch_size=None, which batch is next."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def drawn(loader: DataLoader[Any], seed: int, epoch: int, most: int | None) -> list[Any]:
    """What a loader's sampler gives for an epoch, at most `most` of it, with every generator that is known seeded, and
    afterwards as it was."""
    sampler = _sampler(loader)
    holders = (loader, sampler, getattr(sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    own = [(generator, generator.get_state()) for generator in found if isinstance(generator, torch.Generator)]
    with forked():
        seed_host(seed)
        for generator, _ in own:
            generator.manual_seed(seed)
        for holder in holders:
            if callable(begin := getattr(holder, "set_epoch", None)):
                begin(epoch)
        try:
            return list(islice(iter(sampler), len(sampler) if most is None else most))
        finally:
            for generator, before in own:
                generator.set_state(before)


def _digest(batches: list[Any]) -> str:
    plain = [batch.tolist() if isinstance(batch, (Tensor, np.ndarray)) else batch for batch in batches]
    return hashlib.sha256(repr(plain).encode()).hexdigest()


class LoaderBatches(Epochs):
    """The batches of a `DataLoader` over map-style data, fetched anew from seeds.

    What an epoch's batches hold is drawn before its first one is read: the sampler runs with the random numbers of
    torch, NumPy and Python seeded by (seed, epoch), its generator and the loader's seeded likewise, after
    `set_epoch(epoch)` where it has that. So a resumed epoch leaves out its first batches without reading them. Each
    batch is fetched and collated with random numbers of its own, whichever process does so.

    Args:
        length: batches in an epoch; None: all that the sampler gives. In training a last batch of a single sample is
            left out, on which no batch statistic exists.

    Raises:
        ConfigError: no batches, or fewer than `length`; a sampler without an end; one that gives other batches when it
            is seeded alike.
    """

    def __init__(
        self, loader: DataLoader[Any], seed: int, argument: str, *, train: bool, length: int | None = None
    ) -> None:
        self.loader, self.seed, self.argument, self.train, self.most = loader, seed, argument, train, length
        self.single, sampler = loader.batch_sampler is None, type(_sampler(loader)).__name__
        if length is None and not _has_length(_sampler(loader)):
            raise ConfigError(
                f"{argument}: expected a sampler with a length, got {sampler} without one; "
                + ("give Task(batches_per_epoch=...)" if train else "give one")
            )
        order = self.order(0)
        if not order:
            raise ConfigError(
                f"{argument}: expected at least one batch, got none of {len(cast(Sized, loader.dataset))} samples "
                f"(batch_size = {loader.batch_size}, drop_last = {loader.drop_last})"
            )
        if length is not None and len(order) < length:
            raise ConfigError(f"batches_per_epoch: expected at most the {len(order)} of {argument}, got {length}")
        if _digest(order) != _digest(self.order(0)):
            raise ConfigError(
                f"{argument}: expected a sampler that gives the same batches when it is seeded alike, so that a run "
                f"can be resumed; {self._drawing()} does not: draw from torch's, NumPy's or Python's own "
                "random numbers, from a torch.Generator under `generator`, or from what set_epoch(epoch) was given"
            )
        self.length = len(order)
        how = {**settings_of(loader), "persistent_workers": loader.persistent_workers}
        self.reader = Reader(Fetch(loader.dataset, loader.collate_fn, single=self.single), how)

    def __len__(self) -> int:
        return self.length

    def _drawing(self) -> str:
        """What draws the samples, for messages: the user's own sampler, also in torch's BatchSampler."""
        sampler = _sampler(self.loader)
        name = type(sampler).__name__
        return f"{type(sampler.sampler).__name__} in its {name}" if type(sampler) is BatchSampler else name

    def order(self, epoch: int) -> list[Any]:
        """What the batches of an epoch hold, as the sampler says it."""
        found = drawn(self.loader, _seed(self.seed, epoch, self.train), epoch, self.most)
        lone = self.train and not self.single and len(found) > 1 and len(found[-1]) == 1 < len(found[0])
        return found[:-1] if lone and self.most is None else found

    def keys(self, epoch: int) -> list[Key]:
        """The batches of an epoch, each with its seed."""
        seed = _seed(self.seed, epoch, self.train)
        found = self.order(epoch)
        if len(found) != self.length:
            raise ConfigError(
                f"{self.argument}: expected {self.length} batches in every epoch, as in the first, got {len(found)} in "
                f"epoch {epoch}; Task(batches_per_epoch=...) takes the first ones"
            )
        return [(hash((seed, index)) % 2**63, samples) for index, samples in enumerate(found)]

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; the first `skip` are not read."""
        for batch in self.reader.read(self.keys(epoch)[skip:]):
            yield pair_of_batch(batch, self.argument)

    def close(self) -> None:
        self.reader.close()

    def first(self) -> Batch:
        """The first batch of the first epoch, read in this process: of two samples where batches of any size come."""
        seed, samples = self.keys(0)[0]
        if type(self.loader.batch_sampler) is BatchSampler and not self.loader.drop_last:
            samples = samples[:2]
        return pair_of_batch(self.reader.loader.dataset[seed, samples], self.argument)


class StreamBatches(Epochs):
    """The batches of data that can only be read on (`IterableDataset`), begun anew in every epoch.

    A worker's random numbers are seeded by (seed, epoch, worker), as torch does it, so that workers begin anew in each
    epoch, whatever `persistent_workers` says; data that is read in this process draws from (seed, epoch, batch). The
    dataset's `set_epoch(epoch)` is called where it has that. A resumed epoch reads its first batches again and drops
    them. Sharing the data out between workers is the dataset's business, as in torch.

    Args:
        length: batches in an epoch of training; None: `len()` of the loader. Other epochs end where the data does.

    Raises:
        ConfigError: no length in training.
    """

    def __init__(
        self, loader: DataLoader[Any], seed: int, argument: str, *, train: bool, length: int | None = None
    ) -> None:
        self.loader, self.seed, self.argument, self.train, self.told = loader, seed, argument, train, length
        if train and length is None:
            if not _has_length(loader.dataset):
                raise ConfigError(
                    f"{argument}: expected to know how many batches an epoch has, got {type(loader.dataset).__name__} "
                    "without a length; give Task(batches_per_epoch=...), or the dataset a __len__"
                )
            length = len(loader)
            if not length:
                raise ConfigError(f"{argument}: expected at least one batch, got none")
        self.length, self.reading = length, cast(Any, None)

    def close(self) -> None:
        end_workers(self.reading)

    def __len__(self) -> int:
        assert self.length is not None  # in training it is known
        return self.length

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; the first `skip` are read, and left out.

        Raises:
            ConfigError: too few.
        """
        source, seed = self.loader, _seed(self.seed, epoch, self.train)
        if callable(begin := getattr(source.dataset, "set_epoch", None)):
            begin(epoch)
        loader: DataLoader[Any] = DataLoader(
            source.dataset,
            batch_size=source.batch_size,
            collate_fn=source.collate_fn,
            generator=torch.Generator().manual_seed(seed),
            drop_last=source.drop_last,
            **settings_of(source),
        )
        with forked():
            seed_host(seed)
            self.reading = reading = iter(loader)
        try:
            for position in count():
                if position == self.length:
                    return
                with forked():
                    seed_host(hash((seed, position)) % 2**63)
                    batch = next(reading, _END)
                if batch is _END:
                    break
                if position >= skip:
                    yield pair_of_batch(batch, self.argument)
        finally:  # also where whoever reads leaves off
            end_workers(reading)
        if self.train:
            why = "as its len() says" if self.told is None else "as batches_per_epoch says"
            raise ConfigError(f"{self.argument}: expected {self.length} batches in an epoch, {why}, got {position}")
        if not position:
            raise ConfigError(f"{self.argument}: expected at least one batch, got none")


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except (TypeError, NotImplementedError):
        return False
    return True


def batches_of(
    data: Any,
    argument: str,
    *,
    size: int,
    seed: int = 0,
    workers: int = 0,
    train: bool = False,
    length: int | None = None,
) -> Epochs:
    """The batches of whatever a :class:`Task` takes as a split.

    Args:
        size, workers: samples in a batch, and processes that read them, where `data` is no `DataLoader`.
        length: batches in an epoch of training, or None.

    Raises:
        ConfigError: data that cannot be used; `length` for a dataset, which has one.
    """
    if is_loader(data):
        loader = loader_of(data, argument, size, workers)
        kind = StreamBatches if isinstance(loader.dataset, IterableDataset) else LoaderBatches
        return kind(loader, seed, argument, train=train, length=length)
    if length is not None:
        raise ConfigError(
            f"batches_per_epoch: expected None for {argument}, a dataset with a length, got {length}; a DataLoader "
            "takes it"
        )
    batches = dataset_batches(as_dataset(data, argument), size, seed, train=train, workers=workers)
    if not len(batches):
        raise ConfigError(f"{argument}: expected at least one full batch, got {batches.samples} samples")
    return batches


def splits(task: Task, argument: str, fraction: float, seed: int) -> tuple[Any, Any]:
    """What a task trains and validates on; a part of the training data is held out where it brings no validation split.

    Raises:
        ConfigError: nothing can be held out of what a `DataLoader` gives.
    """
    if task.val is not None:
        return task.train, task.val
    if is_loader(task.train):
        raise ConfigError(
            f"{argument}.val: expected a validation split beside training data of which none can be held out, got a "
            f"{'DataLoader' if isinstance(task.train, DataLoader) else type(task.train).__name__} and no val"
        )
    return split_off(as_dataset(task.train, f"{argument}.train"), fraction, seed)


def identity_of(data: Any, argument: str, *, size: int, workers: int) -> Any:
    """What tells one split from another, JSON-ready: [type, length, digest of the content or None] of the dataset.

    Of a `DataLoader` also which samples its sampler puts into a batch, from one fixed seed, and its collate function
    (by name, and what it holds); of data that can only be read on how it is put into batches and by how many workers.
    """
    if not is_loader(data):
        return identity(data, argument)
    loader = loader_of(data, argument, size, workers)
    dataset = loader.dataset
    collate = describe(loader.collate_fn, 1)
    if isinstance(dataset, IterableDataset):
        how = {"batch_size": loader.batch_size, "drop_last": loader.drop_last, "workers": loader.num_workers}
        length = len(cast(Sized, dataset)) if _has_length(dataset) else None
        return [type(dataset).__name__, length, content_of(dataset), {**how, "collate": collate}]
    batches = drawn(loader, 0, 0, None if _has_length(_sampler(loader)) else 1)
    return [*identity(dataset, argument), {"batches": _digest(batches), "collate": collate}]
