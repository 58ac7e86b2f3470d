"""Hierarchy: a Gaussian prior over what tasks have of one kind, its mean theirs (BoRA, arXiv 2407.15857)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import ConfigError
from ..model.state import TaskState

_ROLES = ("delta", "weight", "bias", "norm", "other")


class Hierarchy:
    """MAP of tasks' values theta_d under N(Theta, 1 / tau), Theta flat: minimise sum_d L_d + tau / 2 * sum_d
    ||theta_d - Theta||^2, where Theta = mean_d theta_d.

    The prior is on the values themselves: for a low-rank change on A and B, not on B A, so that tasks must start from
    one A. They do: the first task's values are given to the others here. What a closed gate holds back rests.

    Args:
        states: tasks that have the same modules with values of the same shapes, heads and scores aside.
        tau: 0 or more; math.inf keeps the values equal.

    Raises:
        ConfigError: tasks that differ, naming two.
    """

    def __init__(self, states: Mapping[str, TaskState], tau: float) -> None:
        self.tau, self.names = tau, list(states)
        values = {name: self._values(state) for name, state in states.items()}
        first, *others = self.names
        for name in others:
            mine, theirs = ([(key, tuple(p.shape)) for key, p in values[task].items()] for task in (first, name))
            if mine != theirs:
                raise ConfigError(
                    f"hierarchy: expected tasks with the same parts, got {first!r} and {name!r}, which differ"
                )
        self.groups = [[values[name][key] for name in self.names] for key in values[first]]
        with torch.no_grad():
            for group in self.groups:
                for parameter in group[1:]:
                    parameter.copy_(group[0])

    @staticmethod
    def _values(state: TaskState) -> dict[str, nn.Parameter]:
        """What is tied, by module, role and place."""
        return {
            f"{module} {role} {index}": parameter
            for module, part in state.table.items()
            for role, parameters in part.roles().items()
            if role in _ROLES
            for index, parameter in enumerate(parameters)
        }

    @torch.no_grad()
    def step(self, names: Sequence[str], lr: float) -> None:
        """Move the values of these tasks towards the mean of all: the proximal step of the penalty."""
        if not self.tau or len(self.names) == 1:
            return
        factor = lr * self.tau / (1.0 + lr * self.tau)
        for group in self.groups:
            mean = torch.stack([parameter.detach() for parameter in group]).mean(0)
            for name in names:
                value = group[self.names.index(name)]
                if value.grad is not None and math.isinf(self.tau):
                    value.copy_(mean)
                elif value.grad is not None:
                    value.lerp_(mean, factor)
