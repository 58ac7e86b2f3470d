"""LoRA (arXiv 2106.09685), and selective LoRA: low-rank changes behind TAPS's gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..base.scan import Scan
from ..errors import ConfigError
from ..parts import Gate, Layer, LowRank, Part
from .base import MethodConfig, none_of_these, number, one_of, register_method
from .taps import check_start, gate_penalty


@register_method("lora")
@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """Settings of LoRA: `W + alpha / rank * B A` in every linear layer and ungrouped convolution.

    Attributes:
        rank: of B A. alpha: the change is scaled by alpha / rank.
        selective: True learns for each layer whether it has its change, as TAPS does; `lam`, `threshold` and
            `score_init` are TAPS's then.
        norm: "frozen" keeps the base's normalisation layers, in evaluation mode; "task" gives the task its own.
    """

    rank: int = 8
    alpha: float = 16.0
    selective: bool = False
    lam: float = 0.0
    threshold: float = 0.1
    score_init: float = 0.15
    norm: str = "frozen"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank: expected an int >= 1, got {self.rank!r}")
        number(self.alpha, "alpha", 0.0, open_low=True)
        number(self.lam, "lam", 0.0)
        number(self.threshold, "threshold", 0.0, open_low=True)
        number(self.score_init, "score_init", 0.0, open_low=True)
        if not isinstance(self.selective, bool):
            raise ConfigError(f"selective: expected True or False, got {self.selective!r}")
        if self.lam and not self.selective:
            raise ConfigError(f"lam: expected 0 without selective=True, which it acts on, got {self.lam}")
        for name in ("threshold", "score_init"):
            if not self.selective and getattr(self, name) != getattr(type(self), name):
                got = getattr(self, name)
                raise ConfigError(f"{name}: expected none without selective=True, which it acts on, got {got}")
        one_of(self.norm, ("frozen", "task"), "norm")

    def parts(self, base: Scan) -> dict[str, Part]:
        """A low-rank change on every layer without groups."""
        layers: dict[str, Part] = {
            name: Layer(
                Gate(learn=self.selective, score_init=self.score_init, threshold=self.threshold),
                LowRank(host, rank=self.rank, scale=self.alpha / self.rank),
            )
            for name, host in base.gated.items()
            if not (isinstance(host, nn.Conv2d) and host.groups != 1)
        }
        if not layers and base.rebuilt:
            raise none_of_these(self.method, base)
        return {**layers, **(base.own(base.norms) if self.norm == "task" else {})}

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Raises ConfigError where a learned gate would begin closed."""
        check_start(parts)

    def penalty_of(self, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> Tensor | None:
        """TAPS's, over the gates of selective LoRA."""
        return gate_penalty(parts, self.lam)
