"""Task: the data, loss and metrics of one task, and its deterministic batches."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from ..data.arrays import ArrayDataset
from ..errors import ConfigError
from ..methods.keywords import Keywords
from ..model.outputs import predictions
from ..store import fingerprint
from .fetch import Batch, Epochs, FetchEach, Key, Reader
from .metrics import Metric, hits
from .randomness import forked, seed_host


def outputs_of(model: nn.Module, inputs: Any, task: str, device: torch.device) -> Any:
    """What losses and metrics see of a task's forward on a batch: inputs in a mapping are the forward's keywords.

    Raises:
        ConfigError: a batch of one sample before a batch norm in training; uint8 inputs that the base does not take.
    """
    try:
        if isinstance(inputs, Mapping):
            moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
            return predictions(model(**moved, task=task))
        return predictions(model(torch.as_tensor(inputs).to(device), task=task))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # torch has no type of its own for it
            raise
        raise ConfigError(
            f"task {task!r}: expected batches of two samples or more, of which a batch norm has statistics, got one of "
            f"a single sample; drop_last=True leaves out the last one of a DataLoader ({error})"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError) as error:
        if getattr(inputs, "dtype", None) not in (torch.uint8, np.uint8):  # as some bases take them
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"task {task!r}: expected images as the base takes them, floating point and normalised as in its "
            f"pretraining, got uint8 {list(inputs.shape)}, on which it fails ({reason}); x.float() / 255 is in [0, 1]"
        ) from error


LABELS = ("labels", "label", "target")  # under which a dictionary keeps its target


def pair_of(item: Any, argument: str = "data") -> Any:
    """(inputs, target) of an item or a batch: a dictionary's target is under one of :data:`LABELS`."""
    if not isinstance(item, Mapping):
        return item
    found = [key for key in LABELS if key in item]
    if len(found) != 1:
        which = f", of which {found} all say so" if found else ""
        raise ConfigError(f"{argument}: expected one of {list(LABELS)} in a dictionary, got keys {list(item)}{which}")
    return {key: value for key, value in item.items() if key != found[0]}, item[found[0]]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of targets that are the largest output, in [0, 1]; targets of -100 are left out, as `F.cross_entropy` does.

    Over a split the Trainer counts targets, so that it is exact whatever the batches are.

    Args:
        outputs: `[B, C]`, or `[B, C, ...]` as `F.cross_entropy` takes it. targets: `[B]`, or `[B, ...]`.

    Returns:
        the share, or nan where no target counts.

    Raises:
        ConfigError: other shapes.
    """
    right, counted = hits(outputs, targets)
    return right / counted if counted else math.nan


@dataclass(frozen=True, kw_only=True)
class Task(Keywords):
    """What one task trains on.

    Attributes:
        train: a map-style dataset of (input, target), or a pair of tensors `x [N, ...]`, `y [N, ...]`. An input may be
            a dictionary of what the base's forward takes by keyword, with the target beside it, or in it under
            "labels", "label" or "target", as data for transformers' models have it. Or a `DataLoader`, which says
            itself what is in a batch and who reads it, or an `IterableDataset`; see below.
        val: like `train`; None holds out a part of `train`, which a dataset or a pair of tensors then has to be.
            Selection uses only this split.
        test: like `train`; evaluated once at the end, never used to choose anything.
        loss: `loss(outputs, targets) -> scalar`, a mean over the batch. `outputs` is what the base returns; of a
            transformers `ModelOutput` it is the logits. Losses of torch's that compare element by element want targets
            in the outputs' shape: `[N, 1]` for a head of one output. Means of batches are weighted by their samples;
            those of `F.cross_entropy` (also in a `functools.partial`, and `nn.CrossEntropyLoss`, without class weights)
            by the targets that they do not ignore, so that means over splits and accumulated steps are exact. A batch
            all of whose targets are ignored is passed over.
        metrics: name -> `metric(outputs, targets) -> float`, a mean over the batch, whose values are weighted by the
            batches' samples; or an object with `update(outputs, targets)`, `compute()` and `reset()`, as torchmetrics'
            are, or `whole(function)`, which are computed over the whole split. The first one selects, or the loss if
            there is none. By default :func:`accuracy`.
        maximize: False if less of the first metric is better.
        augment: for training batches: `augment(inputs, generator) -> inputs`, or a transform of torchvision (any
            `nn.Module` or function of one argument), which is given one sample at a time; or None. Random numbers of
            torch, NumPy and Python are seeded for each batch.
        labels: class names, one for each output of a linear head; kept in the task file.
        preprocessing: how inputs are made from files, JSON-ready; kept in the task file.
        batches_per_epoch: batches in an epoch of training, for a `DataLoader` or an `IterableDataset` whose length is
            not known, or that is longer than an epoch should be. None: all of them.

    Datasets are read in the process that trains, or in `TrainConfig.num_workers` others; a `DataLoader` brings
    batch size, sampler, collate function and workers of its own. An epoch's batches, and what is drawn at random for
    them, depend on the seed and the epoch alone (docs/data.md says what that asks of a sampler of yours), so that a run
    that was stopped goes on with the batches that it had not seen: without reading the others, or, where data can only
    be read on, by reading them again. `IterableDataset`s share themselves out between workers, as in torch, and are
    read to their end in validation and test.

    A run in `out` is taken up only for the same data: tensors and image folders count by their content, a dataset class
    of yours by its type, length and labels, and by what its method `identity()` returns (JSON-ready) if it has one; a
    `DataLoader` also by what its sampler puts into batches, and by its collate function.
    """

    train: Any
    val: Any = None
    test: Any = None
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    metrics: Mapping[str, Callable[[Any, Any], float] | Metric] = field(default_factory=lambda: {"accuracy": accuracy})
    maximize: bool = True
    augment: Callable[..., Any] | None = None
    labels: list[str] | None = None
    preprocessing: Mapping[str, Any] | None = None
    batches_per_epoch: int | None = None

    def __post_init__(self) -> None:
        count = self.batches_per_epoch
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ConfigError(f"batches_per_epoch: expected an int >= 1 or None, got {count!r}")
        if not callable(self.loss) or isinstance(self.loss, type):
            got = f"the class {self.loss.__name__}" if isinstance(self.loss, type) else type(self.loss).__name__
            raise ConfigError(f"loss: expected a function of outputs and targets, or an object of a loss, got {got}")
        if not isinstance(self.metrics, Mapping):
            raise ConfigError(f"metrics: expected a mapping of names to functions, got {type(self.metrics).__name__}")
        if "loss" in self.metrics:
            raise ConfigError("metrics: expected names other than 'loss', which is reported anyway")
        for name, metric in self.metrics.items():
            if not isinstance(name, str):
                raise ConfigError(f"metrics: expected names as text, got {name!r}")
            if isinstance(metric, type) or not (callable(metric) or isinstance(metric, Metric)):
                got = f"the class {metric.__name__}" if isinstance(metric, type) else type(metric).__name__
                raise ConfigError(
                    f"metrics[{name!r}]: expected a function of outputs and targets, or an object with update, compute "
                    f"and reset, got {got}"
                )
        if self.augment is not None and not callable(self.augment):
            raise ConfigError(f"augment: expected a function or a transform, got {type(self.augment).__name__}")
        if type(self.augment).__name__ in ("MixUp", "CutMix"):
            raise ConfigError(f"augment: {type(self.augment).__name__} mixes labels too, and gets samples here")
        try:  # now, not when the file is written, after the last epoch
            json.dumps(self.preprocessing, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"preprocessing: expected what JSON holds, got {type(error).__name__}: {error}") from None
        if self.labels is not None:
            listed = isinstance(self.labels, (list, tuple)) and all(isinstance(label, str) for label in self.labels)
            if not listed:
                raise ConfigError(f"labels: expected a list of strings, got {self.labels!r}")
            twice = [label for index, label in enumerate(self.labels) if label in self.labels[:index]]
            if twice:
                raise ConfigError(f"labels: expected different names, got {twice[0]!r} twice")


def augmented(augment: Any, inputs: Any, seed: int) -> Any:
    """A training batch after `augment`, which draws from `seed` alone; a transform sees one sample at a time."""
    if augment is None:
        return inputs
    with forked():
        seed_host(seed)
        if _takes_samples(augment):
            return _samples_augmented(augment, inputs)
        made = augment(inputs, torch.Generator().manual_seed(seed))
    if not isinstance(made, (Tensor, np.ndarray, Mapping)):
        raise ConfigError(f"augment: expected the inputs of a batch to be returned, got {type(made).__name__}")
    return made


def _samples_augmented(augment: Any, inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        raise ConfigError(
            f"augment: expected a function (inputs, generator) where inputs are a dictionary, got "
            f"{type(augment).__name__} of one argument; or let the dataset draw"
        )
    made = [augment(sample) for sample in inputs]
    for sample in made:
        if not isinstance(sample, Tensor):
            raise ConfigError(f"augment: expected a tensor of each sample, got {type(sample).__name__}")
        if sample.shape != made[0].shape:
            raise ConfigError(
                f"augment: expected samples of one shape, got {list(made[0].shape)} and {list(sample.shape)}"
            )
    return torch.stack(made)


def _takes_samples(augment: Any) -> bool:
    """True for a transform: a module, or what needs one argument. A function of a batch needs two, or calls the second
    one `generator`."""
    if isinstance(augment, nn.Module):
        return True
    try:
        signature = inspect.signature(augment)
        signature.bind(None, None)
    except TypeError:
        return True
    except ValueError:  # a builtin tells no signature
        return False
    second = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:2]
    return bool(second) and second[0].default is not second[0].empty and second[0].name != "generator"


def as_dataset(data: Any, argument: str) -> Dataset[Any]:
    """A map-style dataset from a dataset or a pair of tensors of equal length."""
    if isinstance(data, DataLoader):
        raise ConfigError(f"{argument}: expected a dataset or a pair of tensors, got a DataLoader; pass its dataset")
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, (np.ndarray, Tensor)) for t in data):
        try:
            data = tuple(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in data)
        except TypeError as error:
            raise ConfigError(f"{argument}: expected arrays that torch has types for: {error}") from None
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        if len(data[0]) != len(data[1]):
            raise ConfigError(f"{argument}: expected x and y of equal length, got {len(data[0])} and {len(data[1])}")
        data = TensorDataset(*data)
    if isinstance(data, (Mapping, tuple)) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        kinds = f" of {', '.join(type(part).__name__ for part in data)}" if isinstance(data, tuple) else ""
        got = type(data).__name__ + kinds
        if isinstance(data, Iterator) or (hasattr(data, "__iter__") and not isinstance(data, (Mapping, tuple))):
            got += "; what can only be read on comes as an IterableDataset, batches as a DataLoader of torch's"
        elif hasattr(data, "task"):
            got += "; a task's data are its .task(name)"
        raise ConfigError(f"{argument}: expected a map-style dataset or a pair of tensors, got {got}")
    if len(data) == 0:
        raise ConfigError(f"{argument}: expected at least one sample, got none")
    return cast("Dataset[Any]", data)


def targets_of(data: Dataset[Any]) -> Tensor | None:
    """All integer targets `[N]` of a dataset that keeps them in memory, or None."""
    found = data.tensors[1] if isinstance(data, TensorDataset) else getattr(data, "y", getattr(data, "targets", None))
    if isinstance(found, list) and found and all(type(value) is int for value in found):
        found = torch.tensor(found)  # as torchvision's datasets keep them
    if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
        return None
    return found if len(found) == len(cast(Sized, data)) else None


def split_off(data: Dataset[Any], fraction: float, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """(rest, held out): a seeded split.

    Where integer targets are known it is stratified: of each class with two samples or more at least one is held out
    and at least one is not.
    """
    size = len(cast(Sized, data))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    targets = targets_of(data)
    if targets is not None:
        chosen = torch.zeros(size, dtype=torch.bool)
        for value in targets.unique():
            members = order[targets[order] == value]
            most = len(members) - 1
            chosen[members[: min(max(round(fraction * len(members)), 1), most) if fraction else 0]] = True
        held, rest = order[chosen[order]], order[~chosen[order]]
    else:
        count = round(fraction * size)
        held, rest = order[:count], order[count:]
    if not len(held) or not len(rest):
        raise ConfigError(
            f"val_fraction: expected both parts of {size} samples non-empty, got {fraction}; or give the task a val"
        )
    return Subset(data, rest.sort().values.tolist()), Subset(data, held.sort().values.tolist())


def _in_memory(data: Dataset[Any]) -> tuple[Tensor, Tensor] | None:
    """(inputs, targets) of a dataset that only indexes two tensors; a class of the user's may do more."""
    if type(data) is Subset:
        whole = _in_memory(data.dataset)
        index = torch.tensor(list(data.indices))
        return None if whole is None else (whole[0][index], whole[1][index])
    if type(data) is TensorDataset and len(data.tensors) == 2:
        return data.tensors[0], data.tensors[1]
    return (data.x, data.y) if type(data) is ArrayDataset else None


def content_of(dataset: Any) -> str | None:
    """A digest of what is known of a dataset's content, or None: nothing."""
    memory, own = _in_memory(dataset), getattr(dataset, "identity", None)
    if memory is not None:
        return fingerprint({"x": memory[0], "y": memory[1]})
    if callable(own):
        return hashlib.sha256(json.dumps(own()).encode()).hexdigest()
    if type(dataset) is Subset:
        whole = content_of(dataset.dataset)
        chosen = [whole, [int(index) for index in dataset.indices]]
        return None if whole is None else hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    targets = targets_of(dataset) if hasattr(dataset, "__len__") else None
    return None if targets is None else fingerprint({"y": targets})


def identity(data: Any, argument: str) -> list[Any]:
    """What tells one dataset from another, JSON-ready: type, length and a digest of what is known of its content."""
    dataset = as_dataset(data, argument)
    return [type(dataset).__name__, len(cast(Sized, dataset)), content_of(dataset)]


def ordered(samples: int, size: int, seed: int, epoch: int, *, train: bool) -> Sequence[Tensor]:
    """The samples of each batch of an epoch: shuffled in training, a pure function of the seed and the epoch."""
    if not train:
        return torch.arange(samples).split(size)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator).split(size)


def keys_of(chosen: Sequence[Tensor], seed: int, epoch: int, *, train: bool) -> list[Key]:
    """Batches as a :class:`Reader` reads them, whose samples draw from the seed, the epoch and themselves alone."""
    drawn = hash((seed, epoch, train)) % 2**63
    return [(drawn, index.tolist()) for index in chosen]


def collated(items: list[Any]) -> Any:
    """A batch of samples as torch makes it. Raises ConfigError where they do not go together."""
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            "data: expected samples of a batch to be of one shape and kind; a DataLoader with a collate_fn of its own "
            f"can pad them ({str(error).splitlines()[0]:.200})"
        ) from error


class Batches(Epochs):
    """Batches of a dataset in an order that depends on nothing but the seed and the epoch.

    Args:
        data: map-style dataset; tensors held in memory are indexed a batch at a time.
        size: samples in a batch. A training epoch drops a last batch of a single sample, on which no batch
            statistic exists.
        workers: processes that read samples of other datasets; 0 reads in this one. Training's live as long as this.
    """

    def __init__(self, data: Dataset[Any], size: int, seed: int, *, train: bool, workers: int = 0) -> None:
        self.data, self.size, self.seed, self.train = data, size, seed, train
        self.memory = _in_memory(data)
        self.samples = len(cast(Sized, data))
        how = {"num_workers": workers, "persistent_workers": train and workers > 0}
        self.reader = None if self.memory is not None else Reader(FetchEach(data, collated), how)

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self.size)
        return full + (rest > (1 if self.train and self.samples > 1 and self.size > 1 else 0))

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, leaving out the first `skip`."""
        order = ordered(self.samples, self.size, self.seed, epoch, train=self.train)
        chosen = order[skip : len(self)]
        if self.memory is not None:
            for index in chosen:
                yield self.memory[0][index], self.memory[1][index]
            return
        assert self.reader is not None
        for batch in self.reader.read(keys_of(chosen, self.seed, epoch, train=self.train)):
            inputs, targets = pair_of(batch)
            yield inputs, targets

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
