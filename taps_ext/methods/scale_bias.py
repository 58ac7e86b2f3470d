"""Scale-and-bias patches (K for the Price of 1, arXiv 1810.10703)."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.scan import Scan
from ..errors import ConfigError
from ..parts import Gate, Layer, Part, Rows
from .base import MethodConfig, one_of, register_method
from .depthwise import depthwise_layers
from .full import trained_layers


@register_method("scale-bias")
@dataclass(frozen=True, kw_only=True)
class ScaleBiasConfig(MethodConfig):
    """Settings of scale-and-bias patches: a task's own scale and bias (gamma, beta) in every normalisation layer.

    In a base without any normalisation every layer with a bias gets a factor for each output and a bias of its own
    instead, `a * z + b` (ours).

    Attributes:
        last_layer: whether a task has a head of its own; False runs it on the base's.
        statistics: "task" gives batch norms running statistics of the task's own batches; "base" keeps the base's, in
            evaluation mode.
        simultaneous: True trains the base's weights, biases and further tensors, too, for all tasks together (a
            family), each task with its own patch; train with `Trainer.fit(mode="joint")`.
        depthwise: whether depthwise convolutions are the task's own, too (:class:`DepthwiseConfig`).
    """

    last_layer: bool = True
    statistics: str = "task"
    simultaneous: bool = False
    depthwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("last_layer", "simultaneous", "depthwise"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        one_of(self.statistics, ("task", "base"), "statistics")

    @property
    def own_head(self) -> bool:
        """As :attr:`last_layer`."""
        return self.last_layer

    def parts(self, base: Scan) -> dict[str, Part]:
        """Own norms, and depthwise convolutions where they are asked for."""
        parts: dict[str, Part] = dict(base.own(base.norms, buffers=self.statistics == "task"))
        if not base.norms:
            for name, host in base.gated.items():
                if (bias := base.bias(name, host)) is not None:
                    parts[name] = Layer(Gate(learn=False), Rows(host), bias=bias)
        return {**parts, **depthwise_layers(base)} if self.depthwise else parts

    def shared(self, base: Scan) -> dict[str, Part]:
        """With `simultaneous` all that the base has outside of its norms."""
        return {**trained_layers(base, base.weights), **base.own(base.others)} if self.simultaneous else {}
