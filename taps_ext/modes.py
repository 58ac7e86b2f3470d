"""The base's flags: as they were before adapting, and evaluation mode for the bare base while tasks train.

Training flags sit on modules that all threads share. A forward of the bare base in training mode must switch them
off for its duration, so it waits until no task's training forward is running, and those wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_turn = threading.Condition()
_running = 0  # training forwards of tasks, in all threads


@contextmanager
def training() -> Iterator[None]:
    """Around a task's forward in training mode: many at a time, none beside `evaluating`."""
    global _running
    with _turn:
        _running += 1
    try:
        yield
    finally:
        with _turn:
            _running -= 1
            _turn.notify_all()


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Evaluation mode for one forward of the bare base, and back."""
    with _turn:
        _turn.wait_for(lambda: _running == 0)
        flags = [(module, module.training) for module in base.modules()]
        for module, _ in flags:
            module.training = False
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


class Flags:
    """The training mode of a base's modules and `requires_grad` of its parameters, as they are now."""

    def __init__(self, base: nn.Module) -> None:
        self.root = base.training  # the base itself is not kept alive by its flags
        self.modes = [(module, module.training) for module in base.modules() if module is not base]
        self.gradients = [(parameter, parameter.requires_grad) for parameter in base.parameters()]

    def restore(self, base: nn.Module) -> None:
        base.training = self.root
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.gradients:
            parameter.requires_grad_(flag)
