"""Fine-tuning: every parameter and buffer of the model becomes the task's."""

from __future__ import annotations

from dataclasses import dataclass

from ..scan import Scan
from .base import GateSpec, MethodConfig, Plan, register_method


@register_method("full")
@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Settings of full fine-tuning: all gates fixed open; norms, biases and all other tensors the task's own."""

    def plan(self, scan: Scan) -> Plan:
        """Every layer open, every norm and every other tensor of the base."""
        gate = GateSpec(delta=True, learn=False, open=True, bias=True)
        return Plan(dict.fromkeys(scan.gated, gate), list(scan.norms), list(scan.others))
