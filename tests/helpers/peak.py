"""The memory of this process at its peak: what an action adds to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def resident(key: str) -> int:
    """Bytes of memory this process holds ("VmRSS") or has held at most since the last reset ("VmHWM")."""
    words = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()
    return int(words[1]) * 1024


def grown(action: Callable[[], object]) -> int:
    """Bytes by which `action` raises the process's memory at its peak, however much it held before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before
