"""operations: what a task's forward computes, and what of it no other task can share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import ConfigError
from ..model import TaskModel
from ..model.state import TaskState
from ..routing.frame import current
from .dry_run import empty_inputs, hollow
from .step import Step


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one forward, as torch's FlopCounterMode counts: products alone, two for each
    multiply-add.

    Attributes:
        forward: all of them under the task, in evaluation.
        added: those from the first module on, in the order of execution, whose weights, norms or other tensors differ
            from what the task shares with others (the base and its family): what lies before it is computed once for
            all tasks. A layer whose gate is closed differs by nothing; norms of a task's own differ, whatever they
            hold; so does a head. Of a weight that other code reads (that of an `nn.MultiheadAttention`'s out_proj)
            they count from where it is read.
        first: that module, or None where nothing differs.
    """

    forward: int
    added: int
    first: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of an operator that torch's counter does not know."""
    return int(sdpa_flop_count(query, key, value))


_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def differing(state: TaskState) -> list[str]:
    """The modules at which a task computes something else than what it stands on."""
    opened = set(state.open_layers())
    return [name for name, part in state.table.items() if part.gate is None or name in opened or "bias" in part.roles()]


class _First(TorchDispatchMode):
    """Notes what was counted when the first of some modules was entered, or one of its tensors read."""

    def __init__(self, marks: dict[str, str], counter: FlopCounterMode) -> None:
        super().__init__()
        self.marks, self.counter = marks, counter
        self.first: str | None = None
        self.before = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = current()
        if self.first is None and frame is not None and (found := self.marks.keys() & frame.entered):
            self.first, self.before = self.marks[min(found)], int(self.counter.get_total_flops())
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused path of nn.MultiheadAttention, which counts nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def operations(model: TaskModel, inputs: Sequence[Any], *, task: str | None = None) -> Operations:
    """Count the operations of a task's forward, and those that it adds to a model that runs other tasks already.

    Nothing is computed, and nothing of its size is allocated.

    Args:
        model: in any mode; the forward is counted in evaluation. inputs: the forward's positional arguments, of which
            shapes and types matter alone ("meta" tensors will do). task: by default the active one.

    Raises:
        ConfigError: no task; inputs that the model cannot run on.
    """
    name = model.active_task if task is None and isinstance(model, TaskModel) else task
    Step(model, inputs, name, "infer", "sgd", None)  # checks the arguments
    if name is None:
        raise ConfigError("task: expected the name of a task, none being active")
    state = model.state(name)
    state.refresh()
    marks: dict[str, str] = {}
    for module in differing(state):
        host: nn.Module = model.base.get_submodule(module)
        marks |= {
            mark: module for mark in (module, *(f"{module}.{key}" for key in (*host._parameters, *host._buffers)))
        }
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    empty = hollow(model, fake)
    with fake:
        step = Step(empty, empty_inputs(model, inputs), name, "infer", "sgd", None)
        empty.eval()
        empty.state(name).take_as_told(state)
        counter = FlopCounterMode(display=False, custom_mapping=_MORE)
        with _plain_attention(), step.explained(), torch.no_grad(), counter, _First(marks, counter) as first:
            step.forward()
    total = int(counter.get_total_flops())
    return Operations(total, 0 if first.first is None else total - first.before, first.first)
