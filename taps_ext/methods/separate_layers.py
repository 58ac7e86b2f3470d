"""Separate layers: private ones at the bottom or the top, the rest shared (Rethinking Hard-Parameter Sharing,
arXiv 2107.11359)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ..base.scan import Scan, match
from ..errors import ConfigError
from ..parts import Part
from ..parts.host import base_weight
from .base import MethodConfig, number, one_of, register_method, tuple_of_str
from .full import trained_layers


@register_method("separate-layers")
@dataclass(frozen=True, kw_only=True)
class SeparateLayersConfig(MethodConfig):
    """Settings of separate layers: `W + Delta` in the private layers, the frozen base in all others, or with `joint`
    weights that all tasks train together.

    Exactly one of `bottom`, `top`, `layers` and `fraction` says which are private. Layers count in module order, the
    head aside, which is private always.

    Attributes:
        bottom, top: how many layers from the input, or from the output.
        layers: globs of layer names.
        fraction: the longest run of layers from `side` that holds at most this share of the gated weights; where it is
            empty a warning names the smallest that is not. The report counts the private weights, beside all of the
            base's parameters.
        side: "bottom" or "top", for `fraction`.
        joint: True shares the other layers' Deltas, biases and (with `norm="with_layer"`) norms among all tasks, as a
            family; train with `Trainer.fit(mode="joint")`.
        norm: "with_layer" makes a normalisation private with the layer before it; "task" all of them; "frozen" none.
    """

    bottom: int | None = None
    top: int | None = None
    layers: tuple[str, ...] | None = None
    fraction: float | None = None
    side: str = "bottom"
    joint: bool = False
    norm: str = "with_layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple_of_str(self.layers, "layers"))
        given = [name for name in ("bottom", "top", "layers", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"separate-layers: expected one of bottom, top, layers and fraction, got {given or 'none'}"
            )
        for name in ("bottom", "top"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise ConfigError(f"{name}: expected an int >= 0, got {count!r}")
        if self.fraction is not None:
            number(self.fraction, "fraction", 0.0, 1.0)
        if not isinstance(self.joint, bool):
            raise ConfigError(f"joint: expected True or False, got {self.joint!r}")
        one_of(self.side, ("bottom", "top"), "side")
        if self.side != "bottom" and self.fraction is None:
            raise ConfigError(f"side: expected none without fraction, which it is for, got {self.side!r}")
        one_of(self.norm, ("with_layer", "task", "frozen"), "norm")

    def private(self, base: Scan) -> list[str]:
        """The names of the private layers, in module order."""
        weights = base.weights
        names = list(weights)
        if self.layers is not None:
            return match(self.layers, names, "layers")
        from_top = self.top is not None or (self.fraction is not None and self.side == "top")
        ordered = names[::-1] if from_top else names
        count = self.top if self.bottom is None else self.bottom
        if self.fraction is not None:
            sizes = [base_weight(weights[name]).numel() for name in ordered]
            most = self.fraction * sum(sizes)
            count = next((i for i in range(len(sizes)) if sum(sizes[: i + 1]) > most), len(sizes))
        if count is None or count > len(names):
            raise ConfigError(f"separate-layers: expected at most {len(names)} layers, got {count}")
        chosen = set(ordered[:count])
        return [name for name in names if name in chosen]

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Warn of a fraction that chooses nothing."""
        weights = base.weights
        if not self.fraction or not weights or self.private(base):
            return
        sizes = {name: base_weight(host).numel() for name, host in weights.items()}
        first = list(sizes)[-1 if self.side == "top" else 0]
        least = math.ceil(1e6 * sizes[first] / sum(sizes.values())) / 1e6
        warnings.warn(
            f"separate-layers: fraction {self.fraction:g} chooses no layer from the {self.side}; the smallest that "
            f"does is {least:g}, which is {first}",
            stacklevel=4,  # the caller of add_task
        )

    def parts(self, base: Scan) -> dict[str, Part]:
        """An open Delta in the private layers, their biases, and the norms that go with them."""
        private = set(self.private(base))
        norms = {
            name: host
            for name, host in base.norms.items()
            if self.norm == "task" or (self.norm == "with_layer" and base.follows().get(name) in private)
        }
        return {**trained_layers(base, private), **base.own(norms)}

    def shared(self, base: Scan) -> dict[str, Part]:
        """With `joint` the other layers, and their norms."""
        if not self.joint:
            return {}
        private = set(self.private(base))
        norms = {
            name: host
            for name, host in base.norms.items()
            if self.norm == "with_layer" and base.follows().get(name) not in private
        }
        return {**trained_layers(base, base.weights.keys() - private), **base.own(norms)}
