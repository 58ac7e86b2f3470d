"""What each gated layer does in a step: its work, its least traffic, the path it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function

from .. import ops
from ..parts import Gate
from ..parts.host import Slot, host_of
from ..parts.part import Cost, Part
from ..parts.sampling import batch_size
from ..routing.frame import current, sequence_number
from .step import Step

PREFIX = "taps:layer:"
Nodes = dict[str, list[tuple[int, int]]]  # layer: ranges of autograd's numbers, one for each call


@dataclass
class Layer:
    """One gated layer in one step.

    Attributes:
        layer: its name. gate: "open", "closed", or "device" where the host does not know.
        path: "stock", "rebuild" or "fused"; what forward did with the weight. "together" where it was made with those
            of other layers before the base ran, which is no layer's own time. "read" where its forward was not called
            because other code reads the weight: such a layer's work is not measured.
        calls: in one step, those that a backward repeats (activation checkpointing) among them. operations, moved: of
            all calls, and of each backward that ran: floating-point operations, and the bytes that have to be read and
            written at least once.
        forward, backward: seconds of a step, as measured. limit: the least seconds that the machine could take.
    """

    layer: str
    gate: str
    path: str = "stock"
    calls: int = 0
    operations: int = 0
    moved: int = 0
    forward: float = 0.0
    backward: float = 0.0
    limit: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def share(self) -> float:
        """Of the machine's limit, in [0, 1]: 1 is as fast as it can be."""
        return self.limit / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "share": self.share}


def gate_of(gate: Gate) -> str:
    return "device" if gate.known is None else "open" if gate.known else "closed"


def _fraction(step: Step) -> float:
    """The share of the batch that closed layers learn from: whole samples."""
    batch = batch_size(step.inputs, {}, step.model.batch_dim)
    return 1.0 if step.state is None or not batch else step.state.config.sampled(batch) / batch


@contextmanager
def watched(step: Step) -> Iterator[tuple[dict[str, Layer], Nodes]]:
    """Name -> :class:`Layer` of the step's gated layers; forwards inside are marked for profilers and counted."""
    layers: dict[str, Layer] = {}
    nodes: Nodes = {}
    handles: list[Any] = []
    extension = ops._C
    fraction = _fraction(step)

    def watch(name: str, part: Part, gate: Gate, host: nn.Module) -> None:
        row = layers[name] = Layer(name, gate_of(gate))
        nodes[name] = []
        marks: list[Any] = []
        firsts: list[int] = []
        forwards: dict[torch.Size, Cost] = {}

        def add(cost: Cost, calls: int = 0) -> None:
            row.calls += calls
            row.operations, row.moved = row.operations + cost.operations, row.moved + cost.moved

        def count(input: Tensor, output: Tensor) -> None:
            """The forward now, and its backward when it runs: what checkpointing repeats has none of its own."""
            running: Any = step.state.installed.get(name, part)  # type: ignore[union-attr]
            whole = running.cost(host, input, output, fraction)
            with torch.no_grad():
                forwards[input.shape] = forward = running.cost(host, input, output, fraction)
            add(forward, calls=1)
            if output.grad_fn is not None and not torch.autograd._profiler_enabled():
                backward = Cost(whole.operations - forward.operations, whole.moved - forward.moved)
                output.grad_fn.register_prehook(lambda _: add(backward))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if extension is not None:
                extension.taken_path()
            marks.append(record_function(PREFIX + name))
            marks[-1].__enter__()
            firsts.append(sequence_number())

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nodes[name].append((firsts.pop(), sequence_number()))
            marks.pop().__exit__(None, None, None)
            taken = None if extension is None else extension.taken_path()
            inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if output is None:  # checkpointing leaves a repeated forward once it has what it wants of it
                if taken and inputs and inputs[0].shape in forwards:
                    add(forwards[inputs[0].shape], calls=1)
                return
            if extension is not None:
                row.path = taken or "stock"
            frame = current()
            if frame is not None and frame.ready is not None and name in frame.ready:
                row.path = "together"
            row.gate = gate_of(gate)
            if inputs and isinstance(output, Tensor):  # nn.MultiheadAttention gives a tuple: not measured
                count(inputs[0], output)

        handles.append(host.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(host.register_forward_hook(after, with_kwargs=True, always_call=True))

    if step.state is not None:
        for name, part, gate in step.state.gated():
            host = host_of(step.model.base, name)
            if isinstance(host, Slot):  # one weight of several in a module's forward: no call is its own
                layers[name], nodes[name] = Layer(name, gate_of(gate)), []
            else:
                watch(name, part, gate, host)
    try:
        yield layers, nodes
    finally:
        for handle in handles:
            handle.remove()


def fill_times(layers: dict[str, Layer], nodes: Nodes, events: Any, steps: int, device: torch.device) -> None:
    """Add each layer's seconds, forward and backward, from a profiler's events over `steps` steps.

    Backward belongs to the layer in whose forward its node was made: autograd numbers them.
    """
    cuda = device.type == "cuda"
    owner = {number: name for name, ranges in nodes.items() for first, last in ranges for number in range(first, last)}
    for event in events:
        if event.device_type != DeviceType.CPU:  # the marks' twins on the device, and kernels
            continue
        seconds = float(event.device_time_total if cuda else event.cpu_time_total) * 1e-6 / steps
        if event.name.startswith(PREFIX):
            row = layers[event.name.removeprefix(PREFIX)]
            row.forward += seconds if row.operations else 0.0
        elif event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in owner:
            row = layers[owner[event.sequence_nr]]
            row.backward += seconds if row.operations else 0.0
