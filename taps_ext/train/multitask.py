"""Several tasks on the same images: one dataset whose items have a target for each task, some of them missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from ..errors import ConfigError
from .fetch import Batch, FetchEach, Reader
from .task import Batches, as_dataset, collated, identity, keys_of, ordered


class MultiTask:
    """A dataset of items (input, {task: target}); :meth:`task` is what one task sees of it.

        train, val = MultiTask(train_items), MultiTask(val_items)
        tasks = {name: Task(train=train.task(name), val=val.task(name), loss=losses[name]) for name in losses}
        Trainer(model, tasks, config).fit("joint")

    A target that is not there, or None, leaves the sample out of that task's batch before its forward: loss, gradients,
    batch statistics and metrics of the task are those of a batch that does not have the sample. A task without a target
    in a batch is not in that step; in training nor is one with a single target (of batches of more), of which there are
    no batch statistics: where labels are rare, give the task a dataset of its own. It is :meth:`task` itself that does
    so, and no `DataLoader` over it, whose collate function has to see to None. NaN is a target like others.

    All tasks see the samples in the same order. Where a joint run goes through them in step (`mix="all"`), each batch
    is read once for all of them. Random transforms belong into the dataset, where inputs and targets are together;
    `Task.augment` draws for each task on its own.

    Args:
        data: a map-style dataset. An input is what `Task.train` says.

    Raises:
        ConfigError: no dataset.
    """

    def __init__(self, data: Any) -> None:
        self.data = as_dataset(data, "data")
        self._together: dict[Any, _Together] = {}
        self._subsets: dict[tuple[int, ...], MultiTask] = {}

    def task(self, name: str) -> Labels:
        """The dataset of one task: items (input, target), the target None where it is missing."""
        return Labels(self, name)

    def subset(self, indices: Sequence[int]) -> MultiTask:
        """Some of the items; the same object for the same ones, so that tasks share what is read."""
        key = tuple(indices)
        if key not in self._subsets:
            self._subsets[key] = MultiTask(Subset(self.data, list(key)))
        return self._subsets[key]

    def together(self, size: int, seed: int, train: bool, workers: int) -> _Together:
        key = (size, seed, train, workers)
        if key not in self._together:
            self._together[key] = _Together(self.data, *key)
        return self._together[key]


class Labels(Dataset[Any]):
    """What one task sees of a :class:`MultiTask`."""

    def __init__(self, whole: MultiTask, name: str) -> None:
        self.whole, self.name = whole, name

    def __len__(self) -> int:
        return len(cast(Any, self.whole.data))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        inputs, targets = _pair(self.whole.data[index])
        return inputs, targets.get(self.name)

    def identity(self) -> Any:
        """What tells it from others, JSON-ready (see `Task`)."""
        return [self.name, identity(self.whole.data, "data")]

    def first(self, argument: str) -> Dataset[Any]:
        """The first item that has the task's target. Raises ConfigError where none has."""
        for index in range(len(self)):
            if self[index][1] is not None:
                return Subset(self, [index])
        raise ConfigError(f"{argument}: expected items with a target of {self.name!r}, got none in {len(self)}")


def labels_of(data: Dataset[Any]) -> Labels | None:
    """The labels of a task, also of a part of them; None for other datasets."""
    if isinstance(data, Labels):
        return data
    if type(data) is Subset and isinstance(data.dataset, Labels):
        return data.dataset.whole.subset(data.indices).task(data.dataset.name)
    return None


def dataset_batches(data: Dataset[Any], size: int, seed: int, *, train: bool, workers: int) -> Batches:
    """The batches of a task's dataset."""
    labels = labels_of(data)
    if labels is None:
        return Batches(data, size, seed, train=train, workers=workers)
    return LabelBatches(labels, size, seed, train=train, workers=workers)


class LabelBatches(Batches):
    """Batches of one task of a :class:`MultiTask`, without the samples that it has no target for; empty ones too."""

    def __init__(self, labels: Labels, size: int, seed: int, *, train: bool, workers: int) -> None:
        super().__init__(labels, size, seed, train=train, workers=workers)
        self.name, self.together = labels.name, labels.whole.together(size, seed, train, workers)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        own: Iterator[_Items] | None = None  # where the task is not in step with the others
        for index in range(skip, len(self)):
            items = None if own is not None else self.together.batch(epoch, index, starting=index == skip)
            if items is None:
                own = self.together.stream(epoch, index, len(self)) if own is None else own
                items = next(own)
            least = 2 if self.train and self.size > 1 else 1
            self.whole = items.inputs, items.rows(self.name, least)
            yield items.of(self.name, least)

    def close(self) -> None:
        self.together.close()


class _Items:
    """A batch of items: the inputs together, the targets as they are."""

    def __init__(self, items: list[Any]) -> None:
        pairs = [_pair(item) for item in items]
        self.inputs = collated([inputs for inputs, _ in pairs])
        self.targets = [targets for _, targets in pairs]

    def rows(self, name: str, least: int) -> list[int]:
        """Which have a target of a task; none where fewer than `least` have."""
        found = [row for row, targets in enumerate(self.targets) if targets.get(name) is not None]
        return found if len(found) >= least else []

    def of(self, name: str, least: int) -> Batch:
        """The part that has a target of a task; an empty one where fewer than `least` have."""
        rows = self.rows(name, least)
        if not rows:
            return _rows(self.inputs, []), torch.zeros(0)
        inputs = self.inputs if len(rows) == len(self.targets) else _rows(self.inputs, rows)
        return inputs, default_collate([self.targets[row][name] for row in rows])


def _rows(inputs: Any, rows: list[int]) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _rows(value, rows) for key, value in inputs.items()}
    return (
        inputs[torch.tensor(rows, dtype=torch.int64)] if isinstance(inputs, Tensor) else [inputs[row] for row in rows]
    )


def _pair(item: Any) -> tuple[Any, Mapping[str, Any]]:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Mapping):
        got = (
            f"targets of type {type(item[1]).__name__}" if isinstance(item, (tuple, list)) and len(item) == 2 else item
        )
        raise ConfigError(f"data: expected items (input, {{task: target}}) of a MultiTask, got {got!r:.200}")
    return item[0], item[1]


class _Together:
    """Batches of items, read once for tasks that ask for them in step."""

    def __init__(self, data: Dataset[Any], size: int, seed: int, train: bool, workers: int) -> None:
        self.data, self.size, self.seed, self.train, self.workers = data, size, seed, train, workers
        self.readers: list[Reader] = []
        self.at: tuple[int, int] | None = None
        self.last: _Items | None = None
        self.running: Iterator[_Items] | None = None

    def stream(self, epoch: int, skip: int, end: int | None = None) -> Iterator[_Items]:
        """The batches of an epoch, leaving out the first `skip` and those from `end` on."""
        order = ordered(len(cast(Any, self.data)), self.size, self.seed, epoch, train=self.train)
        reader = Reader(FetchEach(self.data, _Items), {"num_workers": self.workers})
        self.readers.append(reader)
        try:
            yield from reader.read(keys_of(order[skip:end], self.seed, epoch, train=self.train))
        finally:
            reader.close()
            self.readers = [other for other in self.readers if other is not reader]

    def batch(self, epoch: int, index: int, *, starting: bool) -> _Items | None:
        """A batch that was read last, or comes next, or with which an epoch starts; None for any other."""
        if self.at == (epoch, index):
            return self.last
        if self.running is None or self.at != (epoch, index - 1):
            if not starting or (self.at is not None and self.at[0] == epoch):
                return None
            self.running = self.stream(epoch, index)
        self.last, self.at = next(self.running), (epoch, index)
        return self.last

    def close(self) -> None:
        """End the processes that read; another epoch begins anew."""
        for reader in self.readers:
            reader.close()
        self.at = self.last = self.running = None
