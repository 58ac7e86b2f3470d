"""Depthwise-convolution patches (K for the Price of 1, arXiv 1810.10703)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..base.scan import Scan
from ..errors import ConfigError
from ..parts import Dense, Gate, Layer, Part
from .base import MethodConfig, one_of, register_method


def depthwise_layers(base: Scan) -> dict[str, Part]:
    """An open Delta on every depthwise convolution.

    Raises:
        ConfigError: the base has none.
    """
    parts: dict[str, Part] = {
        name: Layer(Gate(learn=False), Dense(host))
        for name, host in base.gated.items()
        if isinstance(host, nn.Conv2d) and host.groups == host.in_channels > 1
    }
    if not parts:
        raise ConfigError("depthwise: the base has no depthwise convolution (groups equal to its input channels)")
    return parts


@register_method("depthwise")
@dataclass(frozen=True, kw_only=True)
class DepthwiseConfig(MethodConfig):
    """Settings of depthwise patches: a task's own spatial filters.

    Attributes:
        norm: "task" gives the task its own normalisation layers (a scale-and-bias patch beside it); "frozen" keeps the
            base's, in evaluation mode.
    """

    norm: str = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.norm, ("task", "frozen"), "norm")

    def parts(self, base: Scan) -> dict[str, Part]:
        """Every depthwise convolution, and the norms where they are the task's."""
        return {**depthwise_layers(base), **(base.own(base.norms) if self.norm == "task" else {})}
