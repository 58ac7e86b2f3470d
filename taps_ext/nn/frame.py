"""Which task is running: a frame in a context variable for the length of one `TaskModel.forward`.

Threads never see each other's, and nothing remembers a task between calls. Activation checkpointing runs parts of a
forward again during backward, when that frame is gone: :class:`Call` then says whose forward it was. A call knows
the range of autograd sequence numbers that its forward drew, and lives exactly as long as the graph of its outputs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import GateError, TapsError
from .gated import GatedLayer


class Frame(NamedTuple):
    """One forward: the parts of the running task by module name, and where entered modules are noted."""

    parts: Mapping[str, nn.Module]
    entered: set[str]


_frame: ContextVar[Frame | None] = ContextVar("taps_ext_frame", default=None)
enter = _frame.set
leave = _frame.reset

sequence_number = torch.autograd._get_sequence_nr  # the number that this thread's next autograd node will get


class Call:
    """One differentiable forward of a TaskModel: its owner, task, frame and gates, until its graph is freed.

    Args:
        owner: the TaskModel. task: the name that ran, or None for the base.
        first: `sequence_number()` before the forward.
        outputs: whatever the base returned; tensors are found in containers that torch.utils._pytree knows.
    """

    def __init__(self, owner: nn.Module, task: str | None, frame: Frame, first: int, outputs: Any) -> None:
        self.owner, self.task, self.frame = weakref.ref(owner), task, frame
        self.first, self.last = first, sequence_number()
        self.gates = {name: part.gate for name, part in frame.parts.items() if isinstance(part, GatedLayer)}
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        nodes: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        for node in nodes:
            node.metadata.setdefault("taps_ext", []).append(self)  # the graph keeps the call, nothing else does
        if nodes:
            with _lock:
                _calls.add(self)

    def check_gates(self, names: Iterable[str] | None = None) -> None:
        """Raise GateError if a layer's gate is not the one that the forward ran with."""
        for name in self.gates if names is None else names:
            part = self.frame.parts.get(name)
            if isinstance(part, GatedLayer) and part.gate is not self.gates[name]:
                raise GateError(
                    f"{name}: its gate changed between forward and the recomputation in backward; run backward "
                    "before changing scores or gates"
                )


_calls: weakref.WeakSet[Call] = weakref.WeakSet()
_lock = threading.Lock()


def recomputing() -> bool:
    """True inside a backward with gradients on, as checkpointing repeats a forward; hooks run without them."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    return torch.is_grad_enabled()


def recomputed_call(owner: nn.Module | None = None) -> Call | None:
    """The call whose forward the running backward node belongs to, or None if it is not known.

    Raises:
        TapsError: calls of several threads are alive that it could belong to.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    number = node._sequence_nr()
    with _lock:
        found = [call for call in _calls if call.first <= number < call.last]
    if owner is not None:
        found = [call for call in found if call.owner() is owner]
    if len(found) > 1:
        raise TapsError(
            "activation checkpointing: forwards of several threads or TaskModels are waiting for their backward, and "
            "which of them is recomputed is not known; run each backward before the next thread's forward"
        )
    return found[0] if found else None


def running(name: str) -> Frame | None:
    """The frame in which the module called `name` runs, or None outside of every TaskModel.

    Raises:
        TapsError: the module is recomputed in a backward, and its task or its gate then is not known any more.
    """
    frame = _frame.get()
    if frame is not None or not recomputing():
        return frame
    call = recomputed_call()
    if call is None:
        raise TapsError(
            f"{name}: forward was recomputed during backward, and the forward it repeats is not known; call the base "
            "through TaskModel, which must return tensors (or containers of them) that depend on the checkpointed part"
        )
    call.check_gates([name])
    return call.frame
