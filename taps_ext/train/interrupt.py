"""Ctrl-C between two steps, so that what is saved is whole."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run between two steps; the message says how to resume."""


class Stop:
    """On the main thread, the first Ctrl-C, termination or hang-up asks to stop after this step; the second stops.

    Attributes:
        asked: to stop. due: when (by `time.perf_counter`) a state is to be written, for which steps pause.
    """

    def __init__(self) -> None:
        self.asked, self.due = False, math.inf

    @property
    def saving(self) -> bool:
        """A state is due."""
        return time.perf_counter() >= self.due

    def __enter__(self) -> Stop:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
