"""Which tests a run covers: those of `make test`, or with TAPS_THOROUGH=1 the long ones too; samples drawn by a seed.

`make kernels` and `make fuzz` set TAPS_THOROUGH. Tests marked `thorough` wait for it, tests marked `sanitize` are those
of `make sanitize`, tests marked `cuda` wait for a GPU, and any can ask here for how much it should do.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from taps_ext import ops
from taps_ext.extension import has_kernels

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
            shutil.rmtree(part, ignore_errors=True)  # of one that failed
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to the targets that ask for them; a selection by marks (-m) is taken as it is."""
    if config.option.markexpr:
        return
    marks = {"sanitize"} if THOROUGH else {"sanitize", "thorough"}
    later = {item for item in items if any(mark.name in marks for mark in item.iter_markers())}
    if later:
        config.hook.pytest_deselected(items=[item for item in items if item in later])
        items[:] = [item for item in items if item not in later]


def fold(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Where there is no GPU, put a single item in the place of all that wait for one; TAPS_REQUIRE_CUDA=1 refuses."""
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif ops._C is None or not ops._C.build_info().get("cuda"):
        reason = "the extension was built without CUDA kernels"
    elif not has_kernels(ops._C.build_info()["cuda"]["architectures"], torch.cuda.get_device_capability()):
        reason = "the extension has no kernels for compute capability {}.{}".format(*torch.cuda.get_device_capability())
    else:
        return
    waiting = {item for item in items if item.get_closest_marker("cuda")}
    if not waiting:
        return
    if os.environ.get("TAPS_REQUIRE_CUDA") == "1":
        raise pytest.UsageError(f"TAPS_REQUIRE_CUDA=1, but {reason}")
    items[:] = [item for item in items if item not in waiting]
    items.append(Waiting.from_parent(session, name="cuda", reason=f"{reason}: {len(waiting)} tests wait (make gpu)"))


class Waiting(pytest.Item):
    """Skips, and says why and for how many."""

    def __init__(self, *, reason: str, **settings) -> None:
        super().__init__(**settings)
        self.reason = reason

    def runtest(self) -> None:
        pytest.skip(self.reason)

    def reportinfo(self) -> tuple[Path, None, str]:
        return Path(__file__).parents[1] / "cuda", None, self.name
