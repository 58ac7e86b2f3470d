"""Weights of tasks' losses in joint training: fixed, trained, or a plug-in's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class Weighting(nn.Module):
    """What a task's loss counts in a joint step. Make one, register it by :func:`register_weighting`, and name it in
    `TrainConfig.loss_weights`.

    The losses of a step are made, and propagated back, one after another, so that one task's graph is in memory at a
    time: a weighting is asked for each as it comes, and told all of a step's afterwards. Parameters are trained with
    the tasks (rate `lr`, no decay, not clipped); parameters and buffers are saved with the run's state and put back,
    buffers also where a step is undone. What else it holds is lost where a run is resumed.

    Args:
        tasks: the names of all tasks.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = list(tasks)

    def forward(self, task: str, loss: Tensor) -> Tensor:
        """What is propagated back for a task in this step, a scalar: its mean loss `loss`, weighted, and whatever is
        added to it."""
        return loss

    def after(self, losses: Mapping[str, float]) -> None:
        """A step was taken with these losses, of the tasks that it had."""

    def values(self) -> dict[str, float]:
        """What is recorded of every epoch, by names of your own."""
        return {}


class Fixed(Weighting):
    """Factors that stay: 1 for a task that is not named."""

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        super().__init__(tasks)
        self.weights = dict(weights)

    def forward(self, task: str, loss: Tensor) -> Tensor:
        return loss * self.weights.get(task, 1.0)


Kind = TypeVar("Kind", bound=type[Weighting])
WEIGHTINGS: dict[str, type[Weighting]] = {}


def register_weighting(name: str) -> Callable[[Kind], Kind]:
    """A decorator of a :class:`Weighting` that `TrainConfig(loss_weights=name)` then means.

        @register_weighting("halved")
        class Halved(Weighting):
            def forward(self, task, loss):
                return 0.5 * loss

    Raises:
        ConfigError: no name; no subclass of Weighting; a name that another class has.
    """
    if not isinstance(name, str):
        raise ConfigError(f'register_weighting: expected a name, as in @register_weighting("mine"), got {name!r}')

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Weighting)):
            raise ConfigError(f"register_weighting: expected a subclass of Weighting, got {kind!r}")
        known = WEIGHTINGS.get(name, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(f"register_weighting: {name!r} is {known.__module__}.{known.__qualname__} already")
        WEIGHTINGS[name] = kind
        return kind

    return register


@register_weighting("uncertainty")
class Uncertainty(Weighting):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla, CVPR 2018, arXiv 1705.07115, equation 10): every task has a
    trained log-variance s_t = log sigma_t^2, from 0 on, and the sum over tasks is

        sum_t exp(-s_t) * L_t + s_t / 2

    which is theirs for cross-entropies, 1 / sigma^2 * L + log sigma. Theirs for a squared error halves its weight: give
    such a task half of the mean squared error as its loss. At the minimum s_t = log(2 * L_t), a weight of
    1 / (2 * L_t). Recorded of every epoch: "<task>_log_variance".
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_variances = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in tasks)

    def forward(self, task: str, loss: Tensor) -> Tensor:
        s = self.log_variances[self.tasks.index(task)]
        return torch.exp(-s) * loss + s / 2

    def values(self) -> dict[str, float]:
        return {f"{task}_log_variance": s.item() for task, s in zip(self.tasks, self.log_variances, strict=True)}


def weighting_of(setting: Mapping[str, float] | str | None, tasks: Sequence[str]) -> Weighting:
    """The weighting that `TrainConfig.loss_weights` means.

    Raises:
        ConfigError: a weight for a task that is not there, or a name that nothing is registered by.
    """
    if isinstance(setting, str):
        if setting not in WEIGHTINGS:
            raise ConfigError(f"loss_weights: expected one of {sorted(WEIGHTINGS)}, got {setting!r}")
        kind = WEIGHTINGS[setting]
        try:
            return kind(tasks)
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"loss_weights: expected {kind.__name__}(tasks) to make a Weighting, which calls "
                f"super().__init__(tasks), got {type(error).__name__}: {error}"
            ) from error
    unknown = [name for name in setting or {} if name not in tasks]
    if unknown:
        raise ConfigError(f"loss_weights: expected one of {list(tasks)}, got {unknown[0]!r}")
    return Fixed(tasks, setting or {})


def weighted(weighting: Weighting, task: str, loss: Tensor) -> Tensor:
    """A task's loss by a weighting. Raises ConfigError for what is no scalar."""
    found = weighting(task, loss)
    if not isinstance(found, Tensor) or found.dim():
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"loss_weights: expected {type(weighting).__name__} to return a scalar, got {got}")
    return found
