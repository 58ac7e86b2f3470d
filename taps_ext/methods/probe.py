"""Linear probe: only a new head on the frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from ..scan import Scan
from .base import GateSpec, MethodConfig, Plan, register_method


@register_method("probe")
@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MethodConfig):
    """Settings of a linear probe: all gates fixed closed without a Delta; norms frozen, in evaluation mode."""

    def plan(self, scan: Scan) -> Plan:
        """Nothing but the head."""
        return Plan(dict.fromkeys(scan.gated, GateSpec(delta=False, learn=False, open=False)))
