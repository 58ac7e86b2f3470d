"""Which task is running: a frame in a context variable for the length of one `TaskModel.forward`.

Threads never see each other's, and nothing remembers a task between calls. Activation checkpointing runs parts of a
forward again during backward, when that frame is gone: :class:`Call` then says whose forward it was. A call knows
the range of autograd sequence numbers that its forward drew, and lives exactly as long as the graph of its outputs.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import GateError, TapsError
from ..parts import Part
from ..parts.bind import Bound
from ..parts.sampling import Sample
from .ready import Ready

# A part's binding and the `id` of the module that it was made for, which a copy in that one's place has not. No more
# than that: graphs hold frames, and are to hold no base.
Placed = tuple[Bound, int]


Stacks = Mapping[str, tuple[Part, ...]]
"""The parts that stand on each module, by its name, the lowest first."""


class Frame(NamedTuple):
    """One forward: stacks and their bindings by module name, where entered modules are noted, the sample that closed
    layers learn from, the gates where the host knows them all, weights that were made before the base runs, whether it
    is a method that runs in place of the forward, whose settings are its user's, and of a batch of several tasks what
    runs them, in the place of stacks."""

    stacks: Stacks
    entered: set[str]
    sample: Sample | None = None
    bound: Mapping[str, Placed] = {}
    settings: Mapping[str, tuple[Any, ...]] | None = None
    ready: Ready | None = None
    method: bool = False
    mixture: Any = None


_frame: ContextVar[Frame | None] = ContextVar("taps_ext_frame", default=None)
current = _frame.get
enter = _frame.set
leave = _frame.reset

sequence_number = torch.autograd._get_sequence_nr  # the number that this thread's next autograd node will get

_NESTING = 3  # how deep tensors are looked for in outputs
_ANCHORS = 3  # levels of nodes that hold a call: an output that is a view and written to loses its own node


def _tensors(value: Any, depth: int = _NESTING) -> Iterator[Tensor]:
    """Tensors in containers that torch.utils._pytree knows, in dataclasses and in plain objects."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (nn.Module, type)):
            yield from _tensors(_attributes(leaf), depth - 1)


def _attributes(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def settings(stacks: Stacks) -> dict[str, tuple[Any, ...]]:
    """The gates of a task as they are now, by layer."""
    return {name: found for name, stack in stacks.items() if (found := _setting(stack))}


def _setting(stack: tuple[Part, ...]) -> tuple[Any, ...]:
    return tuple(setting for part in stack if (setting := part.setting()))


def prefix_of(module: str) -> str:
    """What the names of all modules inside of one begin with."""
    return f"{module}." if module else ""


def gate_changed(name: str) -> GateError:
    return GateError(
        f"{name}: its gate changed between forward and the recomputation in backward; run backward before changing "
        "scores or gates, or merging"
    )


class Call:
    """One differentiable forward of a TaskModel: its owner, task, frame and gates, until its graph is freed.

    Args:
        owner: the TaskModel. task: the name that ran, or None for the base.
        first: `sequence_number()` before the forward.
        outputs: whatever the base returned.
        within: the module whose forward alone this was, with the rows of one task of a batch; None for a whole base.
    """

    @torch.compiler.disable
    def __init__(
        self,
        owner: nn.Module,
        task: str | None,
        frame: Frame,
        first: int,
        outputs: Any,
        within: str | None = None,
    ) -> None:
        self.owner, self.task, self.frame, self.within = weakref.ref(owner), task, frame, within
        self.first, self.last, self.thread = first, sequence_number(), threading.get_ident()
        self.frames = [frame] if frame.mixture is None else [one.frame for one in frame.mixture.segments]
        self.settings = [settings(f.stacks) if f.settings is None else f.settings for f in self.frames]
        nodes: list[Any] = [t.grad_fn for t in _tensors(outputs) if t.grad_fn is not None]
        with _lock:
            _threads.setdefault(owner, set()).add(self.thread)
            if nodes:
                _calls.add(self)
        for _ in range(_ANCHORS):
            nodes = [node for node in nodes if self.first <= node._sequence_nr() < self.last]
            for node in nodes:
                node.metadata.setdefault("taps_ext", []).append(self)  # the graph keeps the call, nothing else does
            nodes = [below for node in nodes for below, _ in node.next_functions if below is not None]

    def check_gates(self, names: Iterable[str] | None = None) -> None:
        """Raise GateError if a layer's gate is not the one that the forward ran with."""
        for frame, known in zip(self.frames, self.settings, strict=True):
            for name in known if names is None else names:
                if name in known and _setting(frame.stacks.get(name, ())) != known[name]:
                    raise gate_changed(name)

    def covers(self, number: int, module: nn.Module | None, owner: nn.Module | None, *, runs: bool = False) -> bool:
        """True if a node of this number may belong to this forward, of this owner or with this module; `runs`: it is
        the module's own forward that is repeated."""
        mine: Any = self.owner()
        if mine is None or not self.first <= number < self.last:
            return False
        if module is None:
            return mine is owner and self.within is None
        name: str = module.__dict__["_taps_name"]
        # What is repeated may hold the whole of a module whose rows were dealt out: then they are again.
        if self.within is not None and (runs if name == self.within else not name.startswith(prefix_of(self.within))):
            return False
        return bool(mine.base.get_submodule(name) is module)


_calls: weakref.WeakSet[Call] = weakref.WeakSet()
# The threads that have run differentiable forwards, by owner.
_threads: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def in_backward() -> bool:
    """True while this thread runs a node of a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def running_node() -> int:
    """The sequence number of the backward node that runs, or -1."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def _innermost(found: list[Call]) -> list[Call]:
    """Of a forward within another one, which a batch of several tasks may have, the inner one alone."""
    return [
        call
        for call in found
        if not any(
            call.thread == inner.thread
            and (call.first, inner.last) != (inner.first, call.last)
            and call.first <= inner.first
            and inner.last <= call.last
            for inner in found
        )
    ]


def recomputed_call(
    module: nn.Module | None = None, *, owner: nn.Module | None = None, runs: bool = False
) -> Call | None:
    """The call whose forward the running backward node belongs to, or None if it is not known.

    Raises:
        TapsError: it could belong to forwards of several threads.
    """
    number, here = running_node(), threading.get_ident()
    with _lock:
        found = _innermost([call for call in _calls if call.covers(number, module, owner, runs=runs)])
        threads = set() if not found else _threads.get(found[0].owner(), set())  # type: ignore[arg-type]
    # Numbers are a thread's own: a call of another thread is the one only if that thread alone has run forwards.
    if len(found) > 1 or (found and found[0].thread != here and threads != {found[0].thread}):
        raise TapsError(
            "activation checkpointing: forwards of several threads are waiting for their backward, and which of them "
            "is recomputed is not known; run each backward in the thread of its forward, before other threads' "
            "forwards, and let the base return its tensors"
        )
    return found[0] if found else None


def running(module: nn.Module, *, runs: bool = False) -> Frame | None:
    """The frame in which a routed module runs, or None outside of every TaskModel. `runs`: asked by its forward.

    Raises:
        TapsError: the module is recomputed in a backward, and its task or its gate then is not known any more.
    """
    frame = _frame.get()
    if frame is not None or not in_backward():
        return frame
    call = recomputed_call(module, runs=runs)
    name = module.__dict__["_taps_name"]
    if call is not None:
        call.check_gates([name])
        return call.frame
    if torch.is_grad_enabled():
        raise TapsError(
            f"{name}: forward was recomputed during backward, and the forward it repeats is not known; call the base "
            "through TaskModel, which must return tensors that depend on the checkpointed part"
        )
    return None  # a hook, which runs without gradients
