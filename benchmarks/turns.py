"""Calls timed in turns, so that what else the machine does falls on all of them; and how a measurement is written."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from taps_ext import ops

Call = Callable[[], object]


def milliseconds(
    calls: Mapping[str, Call], turns: int, *, ready: Mapping[str, Call] | None = None, cold: int = 0
) -> dict[str, list[float]]:
    """The times of each call, one a turn.

    Args:
        ready: what is done before a call of that name, untimed.
        cold: bytes that are written before each call, after `ready`, so that what it reads is in no cache.
    """
    other = torch.zeros(cold, dtype=torch.uint8)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            if ready is not None and name in ready:
                ready[name]()
            other.add_(1)
            begun = time.perf_counter()
            call()
            found[name].append(1e3 * (time.perf_counter() - begun))
    return found


def fastest(
    calls: Mapping[str, Call], turns: int, *, ready: Mapping[str, Call] | None = None, cold: int = 0
) -> dict[str, float]:
    """The least of each call's times."""
    return {name: min(found) for name, found in milliseconds(calls, turns, ready=ready, cold=cold).items()}


def write(path: str | os.PathLike[str], facts: Mapping[str, Any], load: float) -> None:
    """A measurement as JSON. `load`: of the machine when it began."""
    isa = None if ops._C is None else ops._C.isa()
    where = {"machine": platform.machine(), "isa": isa, "torch": torch.__version__, "load": round(load, 2)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**where, **facts}, indent=1) + "\n", encoding="utf-8")
