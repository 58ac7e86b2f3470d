"""Which tests a run covers: those of `make test`, or with TAPS_THOROUGH=1 the long ones too; samples drawn by a seed.

`make kernels` and `make fuzz` set TAPS_THOROUGH. Tests marked `thorough` wait for it, tests marked `sanitize` are those
of `make sanitize`, and a test in either can ask here for how much it should do.
"""

from __future__ import annotations

import fcntl
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

THOROUGH = os.environ.get("TAPS_THOROUGH", "") not in ("", "0")
# Another one every day. The first process to ask leaves it to those that it starts, so that workers draw alike.
SEED = os.environ.setdefault("TAPS_SEED", time.strftime("%Y%m%d"))


def drawn(what: str, among: Sequence[T], count: int) -> list[T]:
    """`count` of them, in their order, as the seed has it."""
    chosen = random.Random(f"{SEED} {what}").sample(range(len(among)), count)
    return [among[i] for i in sorted(chosen)]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, one for all workers of a run: the first makes it, the others wait."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = shared / f"{name}.part"
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder
