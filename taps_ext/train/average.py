"""An exponential moving average of what a task trains, used wherever the task is evaluated or kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..model.state import TaskState


class Average:
    """`average <- d * average + (1 - d) * value` after every step, for all that is trained but the scores.

    Gates come from the live scores, and a Delta that got no gradient (a closed one) rests here as well. Over the first
    steps d grows as (1 + step) / (10 + step), so that the average does not linger at the start. Averages of half
    precision are kept in float32, in which small steps are not lost.

    Args:
        decay: d in [0, 1).
    """

    def __init__(self, state: TaskState, decay: float) -> None:
        self.state, self.decay, self.steps = state, decay, 0
        self.values = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self._trained()
        }

    def _trained(self) -> list[tuple[str, Tensor]]:
        scores = {id(gate.score) for _, _, gate in self.state.learned()}
        return [(n, p) for n, p in self.state.named_parameters() if p.requires_grad and id(p) not in scores]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the values after an optimizer step, while its gradients are still there."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self._trained():
            if parameter.grad is not None:
                self.values[name].lerp_(parameter.to(self.values[name].dtype), 1.0 - decay)

    @contextmanager
    @torch.no_grad()
    def used(self) -> Iterator[None]:
        """With the averages in the place of the live values."""
        live = {name: p.detach().clone() for name, p in self._trained()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._trained():
            parameter.copy_(values[name])

    def load(self, values: Mapping[str, Tensor], steps: int) -> None:
        """Go on from saved averages."""
        self.steps, values = steps, self.state.renamed(values)
        for name, value in self.values.items():
            value.copy_(values[name])
