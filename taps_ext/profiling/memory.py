"""Memory: what the bytes of a step's peak are for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor, nn

from ..model import TaskModel


@dataclass
class Memory:
    """Bytes at the moment of a step when most are in use; printed as a table in MB, with their sum.

    Attributes:
        weights: the base's parameters and buffers, whole weights of a merged task, casts kept for autocast.
        deltas: of the gated layers. task: what else the task owns (norms, head, scores, biases).
        optimizer: its state. gradients: of parameters. inputs: of the model.
        activations: made by the forward, in training those kept for backward. temporary: everything else, gradients of
            activations among it. workspace: in which weights are rebuilt.
    """

    weights: int = 0
    deltas: int = 0
    task: int = 0
    optimizer: int = 0
    gradients: int = 0
    inputs: int = 0
    activations: int = 0
    temporary: int = 0
    workspace: int = 0

    @property
    def peak(self) -> int:
        """The sum of the parts, in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        lines = [(part.name, getattr(self, part.name)) for part in fields(self) if getattr(self, part.name)]
        return "\n".join(f"{name:12}{count / 1e6:10.1f} MB" for name, count in [*lines, ("peak", self.peak)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bytes by part, and the peak."""
        return {**asdict(self), "peak": self.peak}


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind some tensors."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def _cast_holders(model: TaskModel) -> list[nn.Module]:
    """What may keep a weight in autocast's type."""
    return [*model.modules(), *(part for name in model.tasks for part in model.state(name).installed.values())]


def casts(model: TaskModel) -> list[Tensor]:
    """The weights that are kept in autocast's type."""
    kept = [module.__dict__.get("_taps_cast") for module in _cast_holders(model)]
    return [found[1] for found in kept if found is not None]


@contextmanager
def casts_kept(model: TaskModel) -> Iterator[None]:
    """Afterwards a model keeps the casts that it kept before, and no others."""
    before = [(module, module.__dict__.get("_taps_cast")) for module in _cast_holders(model)]
    try:
        yield
    finally:
        for module, kept in before:
            module.__dict__.pop("_taps_cast", None)
            if kept is not None:
                module.__dict__["_taps_cast"] = kept


def merged(model: TaskModel) -> list[Tensor]:
    """The whole weights of a merged task."""
    parts = [part for name in model.tasks for part in model.state(name).installed.values()]
    return [tensor for part in parts for tensor in part.installed()]


def resident(model: TaskModel, task: str | None) -> Memory:
    """The bytes that a model holds between steps for its base and one task."""
    memory = Memory(weights=size([*model.base.parameters(), *model.base.buffers(), *merged(model), *casts(model)]))
    if task is not None:
        state = model.state(task)
        family = [] if state.family is None else [*state.family.parameters(), *state.family.buffers()]
        memory.deltas = size([parameter for _, part, _ in state.gated() for parameter in part.changes()])
        memory.task = size([*state.parameters(), *state.buffers(), *family]) - memory.deltas
    return memory
