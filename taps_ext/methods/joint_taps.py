"""Joint TAPS (arXiv 2203.16708): what tasks share is trained with them, below their gated Deltas."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.scan import Scan
from ..parts import Dense, Gate, Layer, Part
from .base import register_method
from .taps import TapsConfig


@register_method("joint-taps")
@dataclass(frozen=True, kw_only=True)
class JointTapsConfig(TapsConfig):
    """Settings of joint TAPS: `W_t = W + S + g_t * Delta_t`, S of all tasks together (a family), norms per task.

    Every setting is :class:`TapsConfig`'s. Train with `Trainer.fit(mode="joint")`, where the gradient of S is divided
    by the number of tasks in a step. Only W_t is determined: a constant may move from every open Delta into S.
    """

    def shared(self, base: Scan) -> dict[str, Part]:
        """S, an open Delta on every gated layer."""
        return {name: Layer(Gate(learn=False), Dense(host)) for name, host in base.weights.items()}
