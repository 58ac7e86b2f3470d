"""An optimizer's step that leaves closed Deltas alone, without asking the host which ones are closed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .state import TaskState


def _hard(optimizer: torch.optim.Optimizer, key: str, value: Any, score: Tensor) -> ConfigError:
    """What is said of state that a gate on the score's device cannot choose."""
    what = f"a tensor on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return ConfigError(
        f"optimizer: expected the state of {type(optimizer).__name__} on {score.device}, where the gates are, got "
        f"{key!r} as {what}; build it with capturable=True where it has that setting"
    )


def _kept(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, score: Tensor) -> dict[str, Any]:
    """Copies of what belongs to a Delta in the optimizer."""
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.device != score.device:
            raise _hard(optimizer, key, value, score)
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


@contextmanager
def resting(optimizer: torch.optim.Optimizer, states: Iterable[TaskState]) -> Iterator[None]:
    """See :meth:`TaskModel.resting`."""
    before = []
    with torch.no_grad():
        for state in states:
            for _, part, gate in state.gated():
                changes = [p for p in part.changes() if p.grad is not None]
                if gate.known is not None or gate.score is None:
                    for parameter in () if gate.known else changes:
                        parameter.grad = None
                    continue
                score = gate.score.detach()
                is_open = score >= gate.threshold  # now: the step moves the score
                for p in changes:
                    before.append((p, p.detach().clone(), _kept(optimizer, p, score), is_open))
    yield
    with torch.no_grad():
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for parameter, value, kept, is_open in before:
            torch.where(is_open, parameter, value, out=parameter)
            for key, now in optimizer.state.get(parameter, {}).items():
                if key not in kept:
                    if capturing:
                        raise ConfigError(
                            f"optimizer: {type(optimizer).__name__} makes {key!r} in a captured step, and would make "
                            "it anew in each replay; take a step before the capture"
                        )
                elif isinstance(now, Tensor):
                    if not isinstance(kept[key], Tensor):
                        raise _hard(optimizer, key, kept[key], is_open)
                    torch.where(is_open, now, kept[key], out=now)
                elif now != kept[key]:
                    raise _hard(optimizer, key, now, is_open)
