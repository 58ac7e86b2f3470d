"""profile: time and memory of a task's step, layer by layer, against the machine's limits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..model import TaskModel
from ..train.precision import TYPES
from .layers import Layer, fill_times, watched
from .machine import Machine, measure
from .memory import Memory
from .step import Step
from .timeline import Series, memory_of, traced


@dataclass
class Profile:
    """What one step costs.

    Attributes:
        rows: the gated layers in module order. seconds: of a whole step, the median of `steps`.
        memory: the peak by its parts. timeline: (milliseconds, bytes in use) over one step.
        machine: the measured roofs that `rows` are compared with.
    """

    task: str | None
    phase: str
    device: str
    threads: int
    rows: list[Layer] = field(repr=False)
    seconds: float
    steps: int
    memory: Memory
    timeline: Series = field(repr=False)
    machine: Machine

    @property
    def gated_seconds(self) -> float:
        """What the gated layers take of a step, a little slower for being watched."""
        return sum(row.seconds for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was measured, layer by layer and in all."""
        rows = [row.to_dict() for row in self.rows]
        facts = {"task": self.task, "phase": self.phase, "device": self.device, "threads": self.threads}
        times = {"seconds": self.seconds, "gated_seconds": self.gated_seconds, "steps": self.steps}
        return {
            **facts,
            **times,
            "memory": self.memory.to_dict(),
            "machine": asdict(self.machine),
            "layers": rows,
            "timeline": self.timeline,
        }

    def to_json(self, **kwargs: Any) -> str:
        """:meth:`to_dict` as text; `kwargs` are those of `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    def table(self) -> str:
        """Plain text: a line for each layer, the totals, and the memory's parts."""
        width = max([5, *(len(row.layer) for row in self.rows)])
        lines = [f"{'layer':<{width}}  gate    path      forward ms  backward ms     MFLOP        MB  % of limit"]
        for row in self.rows:
            if row.path == "read":
                lines.append(f"{row.layer:<{width}}  {row.gate:<6}  read by other code: not measured")
                continue
            lines.append(
                f"{row.layer:<{width}}  {row.gate:<6}  {row.path:<8} {1e3 * row.forward:11.3f} "
                f"{1e3 * row.backward:12.3f} {row.operations / 1e6:9.1f} {row.moved / 1e6:9.2f} {100 * row.share:11.1f}"
            )
        rate, speed = self.machine.rate / 1e9, self.machine.bandwidth / 1e9
        lines.append(
            f"{self.phase} step {1e3 * self.seconds:.1f} ms (median of {self.steps}); gated layers, watched, "
            f"{1e3 * self.gated_seconds:.1f} ms; {self.device}, limits {rate:.0f} GFLOP/s and {speed:.1f} GB/s"
        )
        parts = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in asdict(self.memory).items() if value)
        lines.append(f"peak {self.memory.peak / 1e6:.1f} MB: {parts}")
        return "\n".join(lines)

    __str__ = table

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw memory over time, and the layers against the machine's roofs.

        Raises ConfigError without matplotlib, and for a path that no picture can be written to.
        """
        from ..plot.canvas import check_picture
        from ..plot.profile import profile_picture

        check_picture(path)
        profile_picture(path, self)


def profile(
    model: TaskModel,
    inputs: Sequence[Any],
    *,
    task: str | None = None,
    phase: str = "train",
    optimizer: str = "sgd",
    amp: str | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    steps: int = 5,
    machine: Machine | None = None,
) -> Profile:
    """Measure a step of a task, and leave the model as it was.

    Args:
        inputs: the forward's positional arguments, a whole batch.
        task: by default the active one; None and none active is the base (phase "infer" only).
        phase: "train" or "infer".
        optimizer: "sgd" (momentum) or "adamw", whose state counts as memory.
        amp: "bf16" or "fp16" for autocast; losses are not scaled here.
        loss: `loss(outputs) -> scalar`; by default cross-entropy to class 0, or a mean square.
        steps: that are timed, after two that are not.
        machine: roofs measured before (:func:`measure`).

    Raises:
        ConfigError: an argument that is none of these, or a task with nothing to train; inside of `torch.autocast`,
            which would be in the layers' times and not in their limits.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps: expected an int >= 1, got {steps!r}")
    if machine is not None and not isinstance(machine, Machine):
        raise ConfigError(f"machine: expected what measure() gives, got {type(machine).__name__}")
    name = model.active_task if task is None and isinstance(model, TaskModel) else task
    step = Step(model, inputs, name, phase, optimizer, amp, loss)
    dtype = TYPES[amp] if amp else next(iter(model.base.parameters())).dtype
    machine = measure(step.device, dtype) if machine is None else machine

    def repeat() -> None:
        for _ in range(steps):
            step.run()

    if ops._C is not None:
        ops._C.workspace_clear()  # what it then holds is this step's
    with step.installed():
        with step.explained():
            step.run()
        step.run()
        workspace = 0 if ops._C is None else ops._C.workspace_bytes()
        times = _timed(step, steps)
        with watched(step) as (layers, nodes):
            step.run()
            counts = {key: (row.calls, row.operations, row.moved) for key, row in layers.items()}
            for ranges in nodes.values():
                ranges.clear()
            events = traced(repeat, step.device).events()
        for key, row in layers.items():
            row.calls, row.operations, row.moved = counts[key]
            row.limit = machine.seconds(row.operations, row.moved)
            if not row.operations:
                row.path = "read"
        fill_times(layers, nodes, events, steps, step.device)
        memory, series = memory_of(step, workspace)
    rows = list(layers.values())
    middle = sorted(times)[len(times) // 2]
    return Profile(name, phase, str(step.device), torch.get_num_threads(), rows, middle, steps, memory, series, machine)


def _timed(step: Step, steps: int) -> list[float]:
    """Seconds of each of `steps` steps that nothing watches."""
    times = []
    for _ in range(steps):
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        start = time.perf_counter()
        step.run()
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        times.append(time.perf_counter() - start)
    return times
