"""TAPS: a learned gate on every layer (arXiv 2203.16708)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, suggestion
from ..scan import Scan, match
from .base import GateSpec, MethodConfig, Plan, number, one_of, register_method

_OVERRIDES = ("threshold", "score_init", "learn", "open")


@register_method("taps")
@dataclass(frozen=True, kw_only=True)
class TapsConfig(MethodConfig):
    """Settings of TAPS.

    Attributes:
        lam: weight of the sparsity penalty, lambda of equation (5). The authors sum the gradients of 8
            micro-batches; here they are averaged, so their values do not carry over.
        threshold: tau; a gate is open where its score reaches it.
        score_init: the scores' first value.
        penalty: "layer" counts every layer alike (the paper); "size" in proportion to its parameters, mean 1.
        gate_fraction: share of a batch's samples, drawn anew in each forward, that a closed layer's score gradient is
            estimated from (unbiased); the layer multiplies them alone, and keeps them alone for backward unless the
            graph holds its input anyway. 1.0 is exact, and so is what `nn.MultiheadAttention` does with its weights.
        norm: "task" gives the task its own normalisation layers; "frozen" keeps the base's, in eval mode.
        others: "task" also trains biases, tokens, position tables and the like; "frozen" does not.
        target_modules, exclude_modules: globs of layers to gate, or to leave to the base.
        overrides: per-layer settings, `{glob: {"threshold" | "score_init" | "learn" | "open": value}}`.
    """

    lam: float
    threshold: float = 0.1
    score_init: float = 0.15
    penalty: str = "layer"
    gate_fraction: float = 1.0
    norm: str = "task"
    others: str = "frozen"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self.lam, "lam", 0.0)
        number(self.threshold, "threshold", 0.0, open_low=True)
        number(self.score_init, "score_init", 0.0, open_low=True)
        one_of(self.penalty, ("layer", "size"), "penalty")
        number(self.gate_fraction, "gate_fraction", 0.0, 1.0, open_low=True)
        one_of(self.norm, ("task", "frozen"), "norm")
        one_of(self.others, ("task", "frozen"), "others")
        for pattern, override in dict(self.overrides).items() if isinstance(self.overrides, Mapping) else [("", 0)]:
            if not isinstance(override, Mapping):
                raise ConfigError(f"overrides: expected {{pattern: settings}}, got {self.overrides!r}")
            for key in ("threshold", "score_init"):
                if key in override:
                    number(override[key], f"overrides[{pattern!r}].{key}", 0.0, open_low=True)
            for key in ("learn", "open"):
                if not isinstance(override.get(key, True), bool):
                    raise ConfigError(f"overrides[{pattern!r}].{key}: expected True or False, got {override[key]!r}")
        plain = json.loads(json.dumps({k: dict(v) for k, v in self.overrides.items()}))
        object.__setattr__(self, "overrides", plain)
        for pattern, settings in plain.items():
            for key in settings:
                if key not in _OVERRIDES:
                    raise ConfigError(f"overrides[{pattern!r}]: unknown key {key!r}{suggestion(key, _OVERRIDES)}")
            if "open" in settings and settings.get("learn", True):
                raise ConfigError(f"overrides[{pattern!r}]: 'open' fixes a gate and needs 'learn': False beside it")

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def plan(self, scan: Scan) -> Plan:
        """A learned gate and a Delta on every layer, and the norms and other tensors that the settings name."""
        if not scan.gated and self.exclude_modules is None:
            warnings.warn(
                "TapsConfig: no layer outside the head can be gated (Linear, Conv2d and MultiheadAttention can)",
                stacklevel=3,
            )
        plan = Plan()
        settings: dict[str, dict[str, Any]] = {name: {} for name in scan.gated}
        for pattern, override in self.overrides.items():
            for name in match([pattern], list(scan.gated), "overrides"):
                settings[name].update(override)
        for name, own in settings.items():
            learn = own.get("learn", True)
            plan.gates[name] = GateSpec(
                delta=True,
                learn=learn,
                open=own.get("open", True),
                bias=self.others == "task",
                threshold=own.get("threshold", self.threshold),
                score_init=own.get("score_init", self.score_init),
            )
        if self.norm == "task":
            plan.norms = list(scan.norms)
        if self.others == "task":
            plan.others = list(scan.others)
        return plan
