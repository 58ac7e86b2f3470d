"""One batch of several tasks: whose sample is whose, what each task's run takes of the arguments, and the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import ConfigError, suggestion
from ..parts.sampling import batch_size
from ..routing.layout import Places


class Share(NamedTuple):
    """The samples of one task in a batch: `rows`, int64 on the CPU. Task None is the base."""

    task: str | None
    rows: Tensor

    @property
    def run(self) -> tuple[int, int] | None:
        """(first, number) where they follow each other in the batch, else None."""
        first, count = int(self.rows[0]), len(self.rows)
        return (first, count) if torch.equal(self.rows, torch.arange(first, first + count)) else None


@torch.compiler.disable
def shares(tasks: Sequence[str | None], known: Mapping[str, Any]) -> list[Share]:
    """The samples of each task that is present, in the order of first appearance.

    Raises:
        ConfigError: anything else than a list or tuple of the names of known tasks and None; an empty one.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise ConfigError(f"tasks: expected a list with a task's name or None for each sample, got {tasks!r}")
    if not tasks:
        raise ConfigError("tasks: expected a task's name or None for each sample, got an empty list")
    found: dict[str | None, list[int]] = {}
    for place, name in enumerate(tasks):
        if name is not None and (not isinstance(name, str) or name not in known):
            hint = suggestion(str(name), known)
            raise ConfigError(f"tasks[{place}]: expected one of {list(known)} or None, got {name!r}{hint}")
        found.setdefault(name, []).append(place)
    return [Share(name, torch.tensor(rows)) for name, rows in found.items()]


@torch.compiler.disable
def check_batch(tasks: Sequence[Any], args: Any, kwargs: Any, dim: int) -> None:
    """Raise ConfigError unless the forward's arguments hold as many samples as there are names, and nothing that one
    task's run would leave changed for the next."""
    if len(set(tasks)) > 1:
        for name, value in (*((f"argument {place}", value) for place, value in enumerate(args)), *kwargs.items()):
            _check_shareable(name, value)
    batch = batch_size(args, kwargs, dim)
    if batch != len(tasks):
        found = "no tensor with samples" if batch is None else f"{batch} samples"
        raise ConfigError(
            f"tasks: expected a name for each sample, got {len(tasks)} names and {found} in dimension {dim} "
            "(batch_dim) of the forward's tensors"
        )


_SHAREABLE = (Tensor, type(None), bool, int, float, complex, str, Enum, torch.dtype, torch.device)


def _check_shareable(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_shareable(name, item)
    elif not isinstance(value, _SHAREABLE):
        raise ConfigError(
            f"tasks: expected tensors, numbers and words as the forward's arguments, got a {type(value).__name__} "
            f"({name}): each task's run would find in it what another's has left; call the model for each task"
        )


def _rows_of(tensor: Tensor, dim: int, share: Share) -> Tensor:
    if (run := share.run) is not None:
        return tensor.narrow(dim, *run)
    picked = tensor.index_select(dim, share.rows.to(tensor.device, non_blocking=True))
    last = torch.channels_last
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
    return picked.contiguous(memory_format=last) if channels_last else picked


@torch.compiler.disable
def cut(value: Any, share: Share, batch: int, dim: int) -> Any:
    """Those arguments that hold a sample for each of the batch, with the samples of one task; all others as they are.

    A tensor does where dimension `dim` has the batch's size, and a list of as many tensors (detectors' images).
    """
    if batch == 1:
        return value

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == batch:
            return _rows_of(leaf, dim, share)
        return [leaf[row] for row in share.rows.tolist()] if _listed(leaf, batch) else leaf

    return tree_map(of, value, is_leaf=lambda leaf: _listed(leaf, batch))


def _listed(value: Any, batch: int) -> bool:
    """A list with something for each sample: images, or dictionaries of what is in them."""
    return isinstance(value, list) and len(value) == batch and all(isinstance(item, (Tensor, dict)) for item in value)


class MixedOutput:
    """What a batch of several tasks gave.

        out = model(x, tasks=["birds", None, "cars", "birds"])
        indices, logits = out["birds"]              # tensor([0, 3]), [2, classes of birds]
        for logits in out: ...                      # each sample's own, in the batch's order

    Attributes:
        road: how it was made, "layers" or "tasks" (docs/mixed.md).
    """

    def __init__(
        self, parts: Sequence[tuple[Share, Any]], batch: int, dim: int, road: str, places: Places | None = None
    ) -> None:
        self._parts = {share.task: (share.rows, output) for share, output in parts}
        self._batch, self._dim, self.road, self._places = batch, dim, road, places

    @property
    def tasks(self) -> list[str | None]:
        """The tasks that are in it, in the order of first appearance; None is the base."""
        return list(self._parts)

    def __getitem__(self, task: str | None) -> tuple[Tensor, Any]:
        """(indices, output): which samples of the batch are the task's, ascending, int64 on the CPU, and what the base
        returned for them as a batch. Raises KeyError for a task that has no sample here."""
        try:
            return self._parts[task]
        except KeyError:
            raise KeyError(f"{task!r} has no sample in this batch; its tasks are {self.tasks}") from None

    def __contains__(self, task: object) -> bool:
        return task in self._parts

    def keys(self) -> list[str | None]:
        """:attr:`tasks`, so that `dict(out)` is a dictionary by task."""
        return self.tasks

    def get(self, task: str | None, default: Any = None) -> Any:
        """`out[task]`, or `default` for a task that has no sample here."""
        return self._parts.get(task, default)

    def items(self) -> Iterator[tuple[str | None, tuple[Tensor, Any]]]:
        """(task, (indices, output)) of each task."""
        return iter(self._parts.items())

    def __len__(self) -> int:
        """The number of samples."""
        return self._batch

    def __iter__(self) -> Iterator[Any]:
        """Each sample's own output, in the batch's order: of every tensor its entry in the dimension of samples."""
        found: list[Any] = [None] * self._batch
        for rows, output in self._parts.values():
            for place, row in enumerate(rows.tolist()):
                found[row] = _one(output, place, len(rows), self._dim, self._places)
        return iter(found)

    def __repr__(self) -> str:
        counts = ", ".join(f"{task!r}: {len(rows)}" for task, (rows, _) in self._parts.items())
        return f"MixedOutput({self._batch} samples: {counts})"


def _one(output: Any, place: int, count: int, dim: int, places: Places | None) -> Any:
    if isinstance(output, list) and len(output) == count and not any(isinstance(item, Tensor) for item in output):
        return output[place]

    leaves, spec = tree_flatten(output)
    if places is not None and len(places) == sum(isinstance(leaf, Tensor) for leaf in leaves):
        where = iter(places)
        at = [next(where) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return tree_unflatten(
            [leaf if p is None else p.one(leaf, count, place) for leaf, p in zip(leaves, at, strict=True)], spec
        )

    def of(leaf: Any) -> Any:
        holds = isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == count
        return leaf.select(dim, place) if holds else leaf

    return tree_map(of, output)
