"""How it is measured: variants take turns within every round, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import ops
from ..errors import ConfigError
from ..profiling.machine import Machine, measure
from .cases import Case, Variant
from .result import Result, combined

LEAST, MOST = 5, 101  # rounds
SAMPLE = 2e-4  # seconds: what is shorter is repeated within a sample


def run(
    cases: Sequence[Case],
    *,
    seconds: float = 120.0,
    passes: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[Result], Any] | None = None,
) -> list[Result]:
    """Measure cases, all in about that many seconds (or as long as five rounds of each take).

    Args:
        cases: of :func:`suite`, for the same device.
        passes: how often all cases are measured, one after the other, in that time; what comes of each is
            :func:`combined`.
        progress: called with each result as it is there: in the last pass.

    Raises:
        ConfigError: the compiled extension is missing: there would be nothing of ours to measure; no passes.
    """
    if ops._C is None:
        raise ConfigError("bench: expected the compiled extension, which cannot be loaded (see `taps env`)")
    if passes < 1:
        raise ConfigError(f"passes: expected at least one, got {passes}")
    device = torch.device(device)
    machines = {torch.float32: measure(device, torch.float32, seconds=0.3)}
    for case in cases:
        if case.dtype not in machines:
            machines[case.dtype] = _best_of(machines.get(torch.float32), measure(device, case.dtype, seconds=0.3))
    found: list[list[Result]] = [[] for _ in cases]
    results = []
    for index in range(passes):
        for case, of_case in zip(cases, found, strict=True):
            of_case.append(_measured(case, machines[case.dtype], seconds / len(cases) / passes, device))
            if index == passes - 1:
                results.append(combined(of_case))
                if progress is not None:
                    progress(results[-1])
    return results


def _best_of(single: Machine | None, own: Machine) -> Machine:
    """A CPU may emulate a narrow type more slowly than it computes in fp32; its limit is the better of the two."""
    return own if single is None else Machine(max(own.bandwidth, single.bandwidth), max(own.rate, single.rate))


def _measured(case: Case, machine: Machine, seconds: float, device: torch.device) -> Result:
    began = time.perf_counter()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        variants = case.make()
    extension = ops._C
    assert extension is not None
    with torch.set_grad_enabled(case.gradients):
        extension.taken_path()  # forget the path of what ran before
        variants["taps"](0)
        path = None if case.gradients else extension.taken_path()
        predicted = path is not None and extension.taken_by_prediction()
        times = interleaved(variants, seconds - (time.perf_counter() - began), device)
    limit = machine.seconds(case.operations, case.moved) if case.moved else None
    return Result(case.group, case.layer, case.rows, case.dtype, path, times, limit, predicted=predicted)


def interleaved(variants: dict[str, Variant], seconds: float, device: torch.device) -> dict[str, float]:
    """The median seconds of each: all once in every round, in an order that rotates.

    Every call of a variant gets a number, by which it picks among weights that take turns: its own calls in order, from
    a start of its own, so that it does not find the weights that another has just read.
    """
    turns = {name: place * 10_007 for place, name in enumerate(variants)}
    kept: list[Any] = [None]

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def sample(name: str, repeats: int) -> float:
        run, turn = variants[name], turns[name]
        synchronize()
        start = time.perf_counter()
        for index in range(turn, turn + repeats):
            kept[0] = run(index)  # the last result lives on: the heap does not shrink and grow between two calls
        synchronize()
        turns[name] = turn + repeats
        return (time.perf_counter() - start) / repeats

    alone = {name: min(sample(name, 1) for _ in range(4)) for name in variants}
    repeats = {name: max(1, min(1000, round(SAMPLE / seconds))) for name, seconds in alone.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    began = time.perf_counter()
    for index in range(MOST):
        if index >= LEAST and time.perf_counter() - began > seconds:
            break
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(sample(name, repeats[name]))
    return {name: statistics.median(found) for name, found in times.items()}
