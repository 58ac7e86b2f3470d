"""Metrics of a whole split: counted, updated batch by batch, or computed on all outputs at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .identity import describe
from .tokens import IGNORED, token_accuracy, token_cross_entropy, token_hits


@runtime_checkable
class Metric(Protocol):
    """A metric that is computed over a whole split, as torchmetrics' are: `update` for each batch, then `compute`."""

    def update(self, outputs: Any, targets: Any) -> Any: ...

    def compute(self) -> Any: ...

    def reset(self) -> Any: ...


class whole:
    """A metric that sees all outputs and targets of a split at once, on the CPU: F1, AUC, correlations.

    Args:
        function: `function(outputs [N, ...], targets [N, ...]) -> float`. All outputs of a split are held in memory.

    Raises:
        ConfigError: outputs or targets that are no tensors, or whose shapes differ between batches.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], float]) -> None:
        if not callable(function):
            raise ConfigError(f"whole: expected a function of outputs and targets, got {type(function).__name__}")
        self.function = function
        self.reset()

    def reset(self) -> None:
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []

    def update(self, outputs: Any, targets: Any) -> None:
        for name, value, kept in (("outputs", outputs, self.outputs), ("targets", targets, self.targets)):
            if not isinstance(value, Tensor):
                raise ConfigError(f"whole: expected {name} to be a tensor, got {type(value).__name__}")
            if kept and kept[0].shape[1:] != value.shape[1:]:
                first = list(kept[0].shape[1:])
                raise ConfigError(
                    f"whole: expected {name} of one shape in all batches, got {first} and "
                    f"{list(value.shape[1:])} a sample"
                )
            kept.append(value.detach().cpu())

    def compute(self) -> float:
        return float(self.function(torch.cat(self.outputs), torch.cat(self.targets)))


def hits(outputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """How many targets are the largest output, and how many count: all but those of -100.

    Args:
        outputs: `[B, C]`, or `[B, C, ...]` as `F.cross_entropy` takes it. targets: `[B]`, or `[B, ...]`.

    Raises:
        ConfigError: other shapes.
    """
    labels = outputs.argmax(dim=min(1, outputs.dim() - 1))
    if labels.shape != targets.shape:
        raise ConfigError(
            f"accuracy: expected targets {list(labels.shape)} for outputs {list(outputs.shape)}, got "
            f"{list(targets.shape)}; give the task metrics of its own"
            + (", such as token_accuracy" if outputs.shape[:-1] == targets.shape else "")
        )
    counts = targets != IGNORED
    return int(((labels == targets) & counts).sum()), int(counts.sum())


def weight_of(loss: Callable[..., Any], targets: Any) -> float:
    """What the mean loss of a batch weighs among others: what it is the mean of.

    That of `F.cross_entropy` (or a partial of it, or `nn.CrossEntropyLoss`) and of `token_cross_entropy` is one of the
    targets that are not ignored, so that means over batches are those over all targets. A loss that has a method
    `counts(targets)` says it itself, as those of maps do. A batch of other losses weighs its samples. 0: nothing in it
    counts.
    """
    counts = getattr(loss, "counts", None)
    if callable(counts) and isinstance(targets, Tensor):
        return float(counts(targets)) if len(targets) else 0.0
    ignored = _ignored_by(loss)
    if ignored is None or not isinstance(targets, Tensor) or targets.is_floating_point():
        return float(len(targets))
    return float((targets != ignored).sum())


def _ignored_by(loss: Callable[..., Any]) -> int | None:
    """The label that a mean cross-entropy leaves out, or None for other losses."""
    if loss is token_cross_entropy:
        return IGNORED
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.ignore_index if loss.reduction == "mean" and loss.weight is None else None
    settings: dict[str, Any] = {}
    if isinstance(loss, functools.partial):  # of a partial it is one itself
        settings, loss = loss.keywords, loss.func
    if loss is not F.cross_entropy or settings.get("weight") is not None or settings.get("reduction", "mean") != "mean":
        return None
    return int(settings.get("ignore_index", IGNORED))


def number_of(name: str, value: Any) -> float:
    """What a metric gave. Raises ConfigError, naming it, for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) and value.numel() > 16 else f"{value!r:.200}"
        raise ConfigError(f"metrics[{name!r}]: expected a number, got {got}") from None


class _Mean:
    """A function's values, weighted by the samples of their batches."""

    def __init__(self, name: str, function: Callable[[Any, Any], float]) -> None:
        self.name, self.function, self.total, self.samples = name, function, 0.0, 0

    def update(self, outputs: Any, targets: Any) -> None:
        self.total += number_of(self.name, self.function(outputs, targets)) * len(targets)
        self.samples += len(targets)

    def compute(self) -> float:
        return self.total / self.samples if self.samples else math.nan


class _Accuracy:
    """An accuracy over a whole split, exactly. `count`: gives how many of a batch are right, and how many count."""

    def __init__(self, count: Callable[[Any, Any], tuple[int, int]]) -> None:
        self.count, self.right, self.counted = count, 0, 0

    def update(self, outputs: Any, targets: Any) -> None:
        right, counted = self.count(outputs, targets)
        self.right, self.counted = self.right + right, self.counted + counted

    def compute(self) -> float:
        return self.right / self.counted if self.counted else math.nan


class Measured:
    """The loss and metrics of a task over a split.

    Args:
        metrics: name -> a function of a batch, or a :class:`Metric`, which is reset here and moved to `device` where it
            can be. counted: the function that is counted by :func:`hits` instead of averaged: `accuracy`.
    """

    def __init__(
        self, loss: Callable[..., Any], metrics: Mapping[str, Any], counted: Callable[..., Any], device: torch.device
    ) -> None:
        self.loss, self.total, self.weight = loss, 0.0, 0.0
        self.metrics: dict[str, Any] = {}
        for name, metric in metrics.items():
            if metric is counted:
                self.metrics[name] = _Accuracy(hits)
            elif metric is token_accuracy:
                self.metrics[name] = _Accuracy(token_hits)
            elif is_metric(metric):
                if isinstance(metric, nn.Module):
                    metric.to(device)
                metric.reset()
                self.metrics[name] = metric
            else:
                self.metrics[name] = _Mean(name, metric)

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a batch."""
        weight = weight_of(self.loss, targets)
        if weight:
            self.total += float(self.loss(outputs, targets)) * weight
            self.weight += weight
        for metric in self.metrics.values():
            metric.update(outputs, targets)

    def compute(self) -> dict[str, float]:
        """The loss, and what the metrics are.

        Raises:
            ConfigError: a metric that is no number, naming it.
        """
        found = {"loss": self.total / self.weight if self.weight else math.nan}
        for name, metric in self.metrics.items():
            found[name] = number_of(name, metric.compute())
            if hasattr(metric, "reset"):
                metric.reset()  # what it held of the split is free again
        return found


def is_metric(metric: Any) -> bool:
    """True for an object (not a class) with `update`, `compute` and `reset`."""
    return isinstance(metric, Metric) and not isinstance(metric, type)


def described(metric: Any) -> Any:
    """As `identity.describe`, of a metric that holds nothing of any split: of a module what its public attributes are,
    since others say where it is and how often it was used."""
    if not is_metric(metric):
        return describe(metric)
    metric.reset()
    if not isinstance(metric, nn.Module):
        return describe(metric)
    owner = type(metric)
    public = {key: describe(value) for key, value in vars(metric).items() if key[:1] != "_" and key != "training"}
    return [f"{owner.__module__}.{owner.__qualname__}", {k: v for k, v in public.items() if v not in (None, {}, [])}]
