"""Residual adapters (arXiv 1705.08045 and 1803.10082): a task's own 1 x 1 convolution at every larger one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..base.scan import Scan
from ..errors import ConfigError
from ..parts import Gate, Layer, ParallelAdapter, Part, SeriesAdapter
from .base import MethodConfig, one_of, register_method


@register_method("residual-adapter")
@dataclass(frozen=True, kw_only=True)
class ResidualAdapterConfig(MethodConfig):
    """Settings of residual adapters, at the convolutions without groups that are larger than 1 x 1. Every task has its
    own normalisation layers.

    Attributes:
        mode: "parallel" puts A beside each, `y = W * x + A * x` (C x O values); even kernel sizes have no middle and
            are left out. "series" puts A behind each, `y = z + A z` with z its result, bias and all (O x O).
    """

    mode: str = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.mode, ("parallel", "series"), "mode")

    def parts(self, base: Scan) -> dict[str, Part]:
        """An adapter at every such convolution, and the norms."""
        hosts = {
            name: host
            for name, host in base.gated.items()
            if isinstance(host, nn.Conv2d) and host.groups == 1 and host.kernel_size != (1, 1)
        }
        if self.mode == "parallel":
            hosts = {name: host for name, host in hosts.items() if all(size % 2 for size in host.kernel_size)}
        if not hosts:
            odd = " of odd size" if self.mode == "parallel" else ""
            raise ConfigError(
                f"residual-adapter: the base has no convolution without groups and with a kernel{odd} above 1x1"
            )
        kind = ParallelAdapter if self.mode == "parallel" else SeriesAdapter
        layers: dict[str, Part] = {name: Layer(Gate(learn=False), kind(host)) for name, host in hosts.items()}
        return {**layers, **base.own(base.norms)}
