"""estimate: a step's peak memory without running it, from a step on tensors that have no storage."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..model import TaskModel
from ..model.gathering import together
from ..parts.host import Slot, base_weight, host_of, owner_of
from .memory import Memory, casts, merged, resident, size
from .step import Step


class _Count(TorchDispatchMode):
    """A log of the storages that operators make and drop, and of the phase of the step in which they do."""

    def __init__(self, known: Iterable[Tensor], gradients: Callable[[], list[Tensor | None]]) -> None:
        super().__init__()
        self.found = gradients
        self.known = {t.untyped_storage()._cdata for t in known}
        self.living: dict[int, int] = {}  # storage -> its number
        self.made: list[tuple[int, str]] = []  # number -> (bytes, phase)
        self.log: list[int] = []  # number + 1 where it is made, the negative where it is dropped
        self.gradients: set[int] = set()
        self.phase, self.since = "", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.living or key in self.known or not storage.nbytes():
            return
        self.living[key] = len(self.made)
        self.made.append((storage.nbytes(), self.phase))
        self.log.append(len(self.made))
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.log.append(-1 - self.living.pop(key))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is made inside belongs to a phase of :meth:`Step.run`."""
        self.phase = phase
        if phase == "taps:optimizer":  # the gradients are whole, and all there
            self.gradients = self._numbers(self.found())
        yield

    def _numbers(self, tensors: Iterable[Tensor | None]) -> set[int]:
        keys = (tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None)
        return {self.living[key] for key in keys if key in self.living}

    def start(self) -> None:
        """The peak is that of what follows."""
        self.since = len(self.log)

    def peak(self, owners: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
        """Bytes by part at the moment when they were most; `owners` are the tensors of parts that outlive the step."""
        total, most = 0, -1
        alive: set[int] = set()
        at_peak: set[int] = set()
        for index, entry in enumerate(self.log):
            number = abs(entry) - 1
            total += self.made[number][0] if entry > 0 else -self.made[number][0]
            (alive.add if entry > 0 else alive.discard)(number)
            if index >= self.since and total > most:
                most, at_peak = total, set(alive)
        kept = dict.fromkeys(self.gradients, "gradients")
        for part, tensors in owners.items():
            kept |= dict.fromkeys(self._numbers(tensors), part)
        parts = dict.fromkeys((*owners, "gradients", "activations", "temporary"), 0)
        for number in at_peak:
            count, phase = self.made[number]
            parts[kept.get(number, "activations" if phase == "taps:forward" else "temporary")] += count
        return parts


def hollow(model: TaskModel, fake: FakeTensorMode) -> TaskModel:
    """A copy of a model whose tensors have no storage."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers(), *merged(model)]:
        empty = fake.from_tensor(tensor.detach(), static_shapes=True)
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = empty
    for module in model.modules():  # results that a forward kept: autograd's own cannot be copied
        for value in tree_leaves(list(vars(module).values())):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = fake.from_tensor(value.detach(), static_shapes=True)
    return copy.deepcopy(model, memo)


def empty_inputs(model: TaskModel, inputs: Sequence[Any]) -> Any:
    """Inputs without values, on the model's device where they are on none; called where tensors have no storage."""
    home = next(model.parameters()).device

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        device = home if value.device.type == "meta" else value.device
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return made.requires_grad_(value.requires_grad)

    return tree_map(empty, tuple(inputs))


def _workspace(step: Step, calls: dict[str, set[tuple[torch.dtype, int]]]) -> int:
    """The largest weight that is rebuilt, or whose gradient is formed, outside of the results; or what is packed."""
    if step.state is None:
        return 0
    training, largest = step.phase == "train", 0
    lent: Counter[int] = Counter()  # by module: the W_t of all weights that its own forward multiplies with
    apart: Collection[str] = ()  # what is made together is counted where it is made
    if training:
        apart = together(step.state.catch_up().gathering, sampled=step.state.config.samples)
    for name, part, _ in step.state.gated():
        if name in apart:
            continue
        host, running = host_of(step.model.base, name), step.state.installed.get(name, part)
        if isinstance(host, Slot):
            lent[id(owner_of(host))] += running.scratch(host, base_weight(host).dtype, 0, training=training)
        for dtype, rows in calls.get(name, ()):
            largest = max(largest, running.scratch(host, dtype, rows, training=training))
    return max([largest, *lent.values()])


def estimate(
    model: TaskModel,
    inputs: Sequence[Any],
    *,
    task: str | None = None,
    phase: str = "train",
    optimizer: str = "sgd",
    amp: str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Memory:
    """The peak memory of a step, before running it: nothing is computed and nothing of its size is allocated.

    Args: as :func:`taps_ext.profile`; of tensors in `inputs` only shapes and types matter ("meta" ones will do).

    Returns:
        The parts of the peak in bytes. It counts what operators return, not what they allocate inside: on a CPU it is
        a lower bound where there are convolutions, which copy images and weights into an order of their own. Neither
        is what torch's allocator does not see in it (scratch memory of oneDNN and cuDNN, the CUDA context,
        fragmentation). A weight that other code reads (`F.linear(x, layer.weight)`) counts as a tensor of its own.

    Raises:
        ConfigError: as :func:`taps_ext.profile`.
    """
    name = model.active_task if task is None and isinstance(model, TaskModel) else task
    Step(model, inputs, name, phase, optimizer, amp, loss)  # checks the arguments
    if name is not None:
        model.state(name).refresh()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    empty = hollow(model, fake)
    memory = resident(empty, name)

    def prepare() -> None:
        if name is not None:
            empty.state(name).take_as_told(model.state(name))

    with fake:
        step = Step(empty, empty_inputs(model, inputs), name, phase, optimizer, amp, loss)
        memory.inputs = size(step.input_tensors())
        empty.train(phase == "train")
        calls = _calls(step)
        tensors = [*empty.parameters(), *empty.buffers(), *merged(empty), *step.input_tensors()]
        count = _Count(tensors, step.gradients)
        with count:
            prepare()
            with step.explained():
                step.run(count.during)  # makes what stays: the optimizer's state, casts
            prepare()
            count.start()
            step.run(count.during)
        owners = {"optimizer": step.optimizer_state(), "weights": casts(empty)}
    found = count.peak(owners)
    memory = replace(memory, **{**found, "weights": memory.weights + found["weights"]})
    memory.workspace = _workspace(step, calls)
    return memory


def _calls(step: Step) -> dict[str, set[tuple[torch.dtype, int]]]:
    """Name -> the types in which a layer computes and its rows (pixels of its result), filled while it runs."""
    found: dict[str, set[tuple[torch.dtype, int]]] = {}

    def watch(name: str) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                rows = output.numel() // max(1, base_weight(module).shape[0])
                found.setdefault(name, set()).add((output.dtype, rows))

        step.model.base.get_submodule(name).register_forward_hook(after)  # of a copy that is soon gone

    for name, _, _ in () if step.state is None else step.state.gated():
        if not isinstance(host_of(step.model.base, name), Slot):
            watch(name)
    return found
