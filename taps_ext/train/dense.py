"""Tasks on the maps of `dense:DIR`: each kind's loss, metric and number of outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.dense import DenseSource, MapTask, class_weights
from ..dense import RMSE, BalancedLoss, BoundaryF, MeanAngle, MeanIoU, NormalsLoss, SegmentationLoss, ValueLoss
from ..errors import ConfigError
from .metrics import Metric
from .multitask import MultiTask
from .task import Task

EDGE_WEIGHT = 0.95  # of MTLoRA's edges


@dataclass(frozen=True)
class MapKind:
    """What a kind of maps is learned with.

    Attributes:
        outputs: of a decoder; None is one for each class. metric: its name in tables. maximize: whether more is better.
    """

    outputs: int | None
    metric: str
    maximize: bool
    loss: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]
    measure: Callable[[int], Metric]


def _balanced(weight: Any) -> BalancedLoss:
    return BalancedLoss(EDGE_WEIGHT if weight is None else weight)


KINDS: Mapping[str, MapKind] = {
    "segmentation": MapKind(None, "miou", True, lambda weights: SegmentationLoss(weights=weights), MeanIoU),
    "boundaries": MapKind(1, "f", True, _balanced, lambda classes: BoundaryF()),
    "edges": MapKind(1, "f", True, _balanced, lambda classes: BoundaryF()),
    "saliency": MapKind(1, "f", True, BalancedLoss, lambda classes: BoundaryF(tolerance=0)),
    "distance": MapKind(1, "rmse", False, lambda weights: ValueLoss(), lambda classes: RMSE()),
    "depth": MapKind(1, "rmse", False, lambda weights: ValueLoss(), lambda classes: RMSE()),
    "normals": MapKind(3, "angle", False, lambda weights: NormalsLoss(), lambda classes: MeanAngle()),
}


def outputs_of(task: MapTask, classes: Sequence[str] | None, name: str) -> int:
    """Outputs of a task's decoder. Raises ConfigError for a segmentation without the names of its classes, and for
    classes of anything else."""
    count = KINDS[task.kind].outputs
    if count is None and not classes:
        raise ConfigError(f"tasks.{name}.classes: expected the names of the classes of a segmentation, or how many")
    if count is not None and classes:
        raise ConfigError(f"tasks.{name}.classes: expected none for {task.kind}, got {list(classes)}")
    return len(classes or ()) if count is None else count


def map_task(
    name: str,
    task: MapTask,
    classes: Sequence[str] | None,
    weights: Any = None,
    *,
    source: DenseSource,
    splits: Mapping[str, MultiTask],
    taps: Sequence[str] = (),
) -> Task:
    """A task of a source, as the Trainer takes it.

    Args:
        classes: their names, of a segmentation. weights: of its classes, or "balanced" for those against rare classes
            (:func:`class_weights`); of edges and saliency the weight of ones. splits: the source's, shared by its
            tasks, so that what several see is read once. taps: names that the task's file is to keep, for who builds
            the base to serve it.

    Raises:
        ConfigError: weights that the kind has not, or of another number than the classes.
    """
    kind, count = KINDS[task.kind], outputs_of(task, classes, name)
    if weights == "balanced" and task.kind == "segmentation":
        weights = class_weights(source.train, name, count)
    if weights is not None:
        several = isinstance(weights, (list, tuple))
        right = several and len(weights) == count if task.kind == "segmentation" else _is_number(weights)
        if (
            not right
            or task.kind in ("distance", "depth", "normals")
            or (several and not all(map(_is_number, weights)))
        ):
            expected = f"'balanced' or {count} numbers" if task.kind == "segmentation" else "a number, or none"
            raise ConfigError(f"tasks.{name}.weights: expected {expected} for {task.kind}, got {weights!r}")
    data = {split: whole.task(name) for split, whole in splits.items()}
    notes: dict[str, Any] = {"kind": task.kind, "taps": list(taps)}
    if task.kind == "distance":
        notes["limit"] = task.limit
    loss = kind.loss(weights)
    if isinstance(loss, BalancedLoss) and loss.weight is not None:
        notes["weight"] = loss.weight  # by which its logits are too large for chances
    return Task(
        train=data["train"],
        val=data.get("val"),
        test=data.get("test"),
        loss=loss,
        metrics={kind.metric: kind.measure(count)},
        maximize=kind.maximize,
        labels=None if not classes else list(classes),
        preprocessing={**source.preprocessing, "map": notes},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
