"""Timeline: the bytes in use over one step, from the allocator's events in a profiler's trace."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from .memory import Memory, resident, size
from .step import Step

Series = list[tuple[float, int]]  # (milliseconds since the step began, bytes in use)


def traced(run: Callable[[], None], device: torch.device, **options: Any) -> Any:
    """A finished torch profile of `run()`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch_profile(activities=activities, **options) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profiler


def memory_of(step: Step, workspace: int) -> tuple[Memory, Series]:
    """The peak of one step by its parts, and the bytes in use over time. The step has run before, twice at least.

    What torch's allocator does not see is not in it: scratch memory of oneDNN and cuDNN.
    """
    base = resident(step.model, step.task)
    base.optimizer = size(step.optimizer_state())
    base.inputs = size(step.input_tensors())
    base.workspace = workspace
    gradients: set[int] = set()

    def run() -> None:
        if step.optimizer is not None:
            hook = step.optimizer.register_step_pre_hook(lambda *_: gradients.update(_addresses(step)))
        step.run()
        if step.optimizer is not None:
            hook.remove()

    if step.optimizer is not None:
        step.optimizer.zero_grad(set_to_none=True)
    profiler = traced(run, step.device, profile_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return _split(events, base, gradients, step)


def _addresses(step: Step) -> set[int]:
    return {g.untyped_storage().data_ptr() for g in step.gradients() if g is not None}


def _split(events: Any, base: Memory, gradients: set[int], step: Step) -> tuple[Memory, Series]:
    forward = next(e for e in events if e.get("name") == "taps:forward" and e.get("cat") == "user_annotation")
    began, ended = forward["ts"], forward["ts"] + forward["dur"]
    kind = 1 if step.device.type == "cuda" else 0  # as c10 numbers devices
    found = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind]
    alive: dict[int, list[Any]] = {}  # address -> [bytes, when, part]
    total = most = base.peak
    at_peak: list[list[Any]] = []
    series: Series = [(0.0, total)]
    blocks: list[list[Any]] = []
    for event in sorted(found, key=lambda e: e["ts"]):
        address, count, now = event["args"]["Addr"], event["args"]["Bytes"], event["ts"]
        if count >= 0:
            alive[address] = [count, now, address, None]
            blocks.append(alive[address])
            total += count
        elif address in alive:
            block = alive.pop(address)
            block[3] = now
            total -= block[0]
        else:
            continue  # made before the step
        series.append(((now - began) / 1e3, total))
        if total > most:
            most, at_peak = total, list(alive.values())
    peak = replace(base)
    for count, made, address, freed in at_peak:
        kept = made <= ended and (step.optimizer is None or freed is None or freed > ended)
        if address in gradients and made > ended:
            peak.gradients += count
        elif kept:
            peak.activations += count
        else:
            peak.temporary += count
    return peak, series
