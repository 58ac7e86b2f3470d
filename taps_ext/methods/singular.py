"""Singular values: a task scales those of every layer (the idea of DiTASK, arXiv 2502.06029, in its simplest form)."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.scan import Scan
from ..parts import Gate, Layer, Part, Singular
from .base import MethodConfig, none_of_these, one_of, register_method


@register_method("singular")
@dataclass(frozen=True, kw_only=True)
class SingularConfig(MethodConfig):
    """Settings of scaled singular values: `W_t = U diag(s exp(a)) V^T` in every layer, `min(N, K)` values each.

    DiTASK moves s by a smooth monotone map of a few parameters. Here each value has a factor of its own (ours), which
    can exchange the order of two. The first forward decomposes every weight, in float64 on the CPU; the axes stay in
    memory, up to twice a weight.

    Attributes:
        norm: "task" gives the task its own normalisation layers; "frozen" keeps the base's, in evaluation mode.
    """

    norm: str = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.norm, ("task", "frozen"), "norm")

    def parts(self, base: Scan) -> dict[str, Part]:
        """Factors on every layer, and norms where they are the task's."""
        layers: dict[str, Part] = {n: Layer(Gate(learn=False), Singular(host)) for n, host in base.gated.items()}
        if not layers and base.rebuilt:
            raise none_of_these(self.method, base)
        return {**layers, **(base.own(base.norms) if self.norm == "task" else {})}
