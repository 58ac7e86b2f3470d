"""Linear probe: only a new head on the frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.scan import Scan
from ..parts import Gate, Layer, Part
from .base import MethodConfig, register_method


@register_method("probe")
@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MethodConfig):
    """Settings of a linear probe: all gates fixed closed, with no change behind them; norms frozen, in evaluation
    mode."""

    def parts(self, base: Scan) -> dict[str, Part]:
        """Nothing but the head."""
        return {name: Layer(Gate(learn=False, open=False), None) for name in base.weights}
