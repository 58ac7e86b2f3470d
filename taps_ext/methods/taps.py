"""TAPS: a learned gate on every layer (arXiv 2203.16708)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..base.scan import Scan, match
from ..errors import ConfigError, suggestion
from ..ops.constant import constant
from ..parts import Dense, Gate, Layer, Part
from ..parts.change import without_autocast
from ..parts.sampling import Sample
from .base import MethodConfig, number, one_of, register_method

_OVERRIDES = ("threshold", "score_init", "learn", "open")


@register_method("taps")
@dataclass(frozen=True, kw_only=True)
class TapsConfig(MethodConfig):
    """Settings of TAPS.

    Attributes:
        lam: weight of the sparsity penalty, lambda of equation (5). The authors sum the gradients of 8
            micro-batches; here they are averaged, so their values do not carry over.
        threshold: tau; a gate is open where its score reaches it.
        score_init: the scores' first value, no less than the threshold: a gate that begins closed, over a Delta of
            zeros, could never open, and `add_task` refuses it.
        penalty: "layer" counts every layer alike (the paper); "size" in proportion to its parameters, mean 1.
        gate_fraction: share of a batch's samples, drawn anew in each forward, that a closed layer's score gradient is
            estimated from (unbiased); the layer multiplies them alone, and keeps them alone for backward unless the
            graph holds its input anyway. 1.0 is exact, and so is what `nn.MultiheadAttention` does with its weights.
        norm: "task" gives the task its own normalisation layers; "frozen" keeps the base's, in eval mode.
        others: "task" also trains biases, tokens, position tables and the like; "frozen" does not.
        target_modules, exclude_modules: globs of layers to gate, or to leave to the base.
        overrides: per-layer settings, `{glob: {"threshold" | "score_init" | "learn" | "open": value}}`.
    """

    lam: float = 0.5
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

    def parts(self, base: Scan) -> dict[str, Part]:
        """A learned gate and a Delta on every layer, and the norms and other tensors that the settings name."""
        weights = base.weights
        if not weights and self.exclude_modules is None:
            why = "all were frozen before the base was wrapped" if base.frozen else "none has a weight"
            warnings.warn(
                f"TapsConfig: no layer outside the head can be gated: {why}; name modules in target_modules",
                stacklevel=3,
            )
        settings: dict[str, dict[str, Any]] = {name: {} for name in weights}
        for pattern, override in self.overrides.items():
            for name in match([pattern], list(weights), "overrides"):
                settings[name].update(override)
        parts: dict[str, Part] = {}
        for name, host in weights.items():
            gate = Gate(**{"threshold": self.threshold, "score_init": self.score_init, **settings[name]})
            parts[name] = Layer(gate, Dense(host), bias=base.bias(name, host) if self.others == "task" else None)
        if self.norm == "task":
            parts |= base.own(base.norms)
        if self.others == "task":
            parts |= base.own(base.others)
        return parts

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Raises ConfigError where a learned gate would begin closed."""
        check_start(parts)

    def penalty_of(self, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> Tensor | None:
        """lam / L * sum w_i |s_i| over the L learned gates (equation 5)."""
        return gate_penalty(parts, self.lam, self.penalty)

    @property
    def samples(self) -> bool:
        """Whether `gate_fraction` is below 1."""
        return self.gate_fraction < 1.0

    def sampled(self, batch: int) -> int:
        """ceil(gate_fraction * batch), at least one."""
        return sample_size(self.gate_fraction, batch)

    def sample(
        self, parts: Mapping[str, Part], batch: int | None, device: torch.device, *, gates: str = "host"
    ) -> Sample | None:
        """ceil(gate_fraction * batch) samples, where a closed gate learns."""
        if gates == "device":
            raise ConfigError(
                'gate_fraction: expected 1.0 with gates="device", where the host does not know which layers are '
                f"closed, got {self.gate_fraction}"
            )
        if batch is None:
            raise ConfigError(
                "gate_fraction: expected a tensor with a batch dimension among the forward's arguments, which samples "
                "can be drawn from"
            )
        if not batch or not any(gate.learns and gate.known is False for gate in learned_gates(parts)):
            return None
        return draw(self.gate_fraction, batch, device)


def check_start(parts: Mapping[str, Part]) -> None:
    """Raise ConfigError where a learned gate would begin closed: its change is zero then, so that its score gets no
    gradient but the penalty's, and it would never open."""
    shut = [(name, gate) for name, part in parts.items() if (gate := part.gate) is not None and gate.learn]
    shut = [(name, gate) for name, gate in shut if not gate.open]
    if shut:
        name, gate = shut[0]
        assert gate.score is not None
        others = f" and {len(shut) - 1} other layers" if shut[1:] else ""
        raise ConfigError(
            f"score_init: expected the threshold or more, since a gate that begins closed can never open, got "
            f"{gate.score.item():.6g} with threshold {gate.threshold:.6g} for {name}{others}; to keep layers closed, "
            "name them in exclude_modules"
        )


def learned_gates(parts: Mapping[str, Part]) -> list[Gate]:
    """The learned gates among a task's parts, in their order."""
    return [part.gate for part in parts.values() if part.gate is not None and part.gate.learn]


def penalty_weights(gates: Sequence[Gate], kind: str) -> list[float]:
    """w_i: 1 ("layer"), or in proportion to the weights behind each gate, with mean 1 ("size")."""
    if kind == "layer":
        return [1.0] * len(gates)
    mean = sum(gate.size for gate in gates) / max(1, len(gates))
    return [gate.size / mean for gate in gates]


def gate_penalty(parts: Mapping[str, Part], lam: float, kind: str = "layer") -> Tensor | None:
    """lam / L * sum w_i |s_i| over the L learned gates (TAPS, equation 5), or None if there are none."""
    gates = learned_gates(parts)
    scores: list[Tensor] = [gate.score for gate in gates if gate.score is not None]
    if not scores:
        return None
    stacked = torch.stack(scores)
    weights = penalty_weights(gates, kind)
    if torch.compiler.is_compiling() or reference.may_be_transformed():
        return reference.sparsity_loss(stacked, stacked.new_tensor(weights), float(lam))
    penalty: Tensor = _Penalty.apply(stacked, float(lam) / len(scores), None if kind == "layer" else weights)
    return penalty


class _Penalty(torch.autograd.Function):
    """:func:`taps_ext.reference.sparsity_loss` in three launches: the signs, the value, and in backward their product
    with its gradient. What products are added to counts for nothing; they are of float32 under autocast too."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, share: float, weights: list[float] | None) -> Tensor:
        signs = scores.sign()
        if weights is not None:
            signs.mul_(constant(tuple(weights), scores.device, scores.dtype))
        ctx.share = share
        ctx.save_for_backward(signs)
        with without_autocast(scores):
            return torch.addmv(scores.new_empty(1), scores[None], signs, beta=0, alpha=share).squeeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (signs,) = ctx.saved_tensors
        with without_autocast(signs):
            return (
                torch.addmv(torch.empty_like(signs), signs[:, None], gradient[None], beta=0, alpha=ctx.share),
                None,
                None,
            )


def sample_size(fraction: float, batch: int) -> int:
    """ceil(fraction * batch), at least one."""
    return max(1, math.ceil(fraction * batch - 1e-9))  # not 3 of 10 for 0.2 + 0.1 = 0.30000000000000004


def draw(fraction: float, batch: int, device: torch.device) -> Sample:
    """A sample of `ceil(fraction * batch)`, from torch's generator of the device: `torch.manual_seed` decides it."""
    return Sample(batch, torch.randperm(batch, device=device)[: sample_size(fraction, batch)].sort().values, [])
