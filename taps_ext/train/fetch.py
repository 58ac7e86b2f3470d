"""Whole batches from seeds: who reads one, when, and after which others changes nothing in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .randomness import forked, seed_host

Batch = tuple[Any, Any]
Key = tuple[int, Any]  # a seed, and what of the dataset it is for


class Epochs(ABC):
    """Batches (inputs, targets) of a split, the same in every run of one seed.

    Attributes:
        whole: of the batch that was given last, the inputs of all tasks' samples, and which of them are this one's;
            None where a task's batches are its own.
    """

    whole: tuple[Any, list[int]] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, leaving out the first `skip`."""

    @abstractmethod
    def close(self) -> None:
        """End the processes that read; nothing is read after it."""


def end_workers(reading: Any) -> None:
    """End the processes behind an iterator of a `DataLoader` now, and not when it is collected as garbage: an error's
    traceback may hold it for long."""
    shutdown = getattr(reading, "_shutdown_workers", None)  # of one that has processes
    if shutdown is not None:
        shutdown()


class Fetch(Dataset[Any]):
    """Batches of a map-style dataset, by (seed, samples); the seed is of all that is drawn for the batch, by the
    dataset and by `collate`.

    Args:
        collate: makes a batch of a list of samples.
        single: `samples` is one index, and what the dataset has there is a batch already (`batch_size=None`).
    """

    def __init__(self, data: Any, collate: Callable[[Any], Any], *, single: bool = False) -> None:
        self.data, self.collate, self.single = data, collate, single

    def __getitem__(self, key: Key) -> Any:
        seed, samples = key
        with forked():
            seed_host(seed)
            return self.collate(self.read(seed, samples))

    def read(self, seed: int, samples: Any) -> Any:
        if self.single:
            return self.data[samples]
        several = getattr(self.data, "__getitems__", None)  # as torch's own loader reads
        return several(samples) if several else [self.data[index] for index in samples]


class FetchEach(Fetch):
    """As :class:`Fetch`, but what a sample draws depends on the sample alone, and not on the batch that it is in."""

    def read(self, seed: int, samples: Any) -> Any:
        found = []
        for index in samples:
            seed_host(hash((seed, index)) % 2**63)
            found.append(self.data[index])
        return found


def settings_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader's processes run: what another one over the same dataset is to be given."""
    kept: dict[str, Any] = {"num_workers": loader.num_workers, "pin_memory": loader.pin_memory}
    if loader.num_workers:
        kept |= {
            "worker_init_fn": _Init(loader.worker_init_fn),
            "prefetch_factor": loader.prefetch_factor,
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return kept


class _Init:
    """A loader's `worker_init_fn`, for which `get_worker_info().dataset` is the loader's own dataset."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, Fetch):
            object.__setattr__(info, "dataset", info.dataset.data)  # it is frozen, and made by torch
        if self.then is not None:
            self.then(worker)


class _Keys:
    """The batches that a :class:`Reader` is to read next."""

    now: Iterable[Key] = ()

    def __iter__(self) -> Iterator[Key]:
        return iter(self.now)


def _same(batch: Any) -> Any:
    return batch


class Reader:
    """Reads batches by their keys, in processes where `settings` say so; these may live from one epoch to the next.

    Args:
        settings: `num_workers` and what else `DataLoader` takes of how to read.
    """

    def __init__(self, batches: Fetch, settings: Mapping[str, Any]) -> None:
        self.keys = _Keys()
        self.reading: Any = None
        self.first = torch.Generator()
        self.loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,  # the batches are made where they are fetched
            sampler=self.keys,
            collate_fn=_same,
            generator=self.first,
            **settings,
        )

    def read(self, keys: Iterable[Key]) -> Iterator[Any]:
        self.keys.now = keys
        self.first.manual_seed(0)  # else to begin draws a number of the run's, and a worker's seed depends on the epoch
        self.reading = iter(self.loader)
        return cast("Iterator[Any]", self.reading)

    def close(self) -> None:
        end_workers(self.reading)
