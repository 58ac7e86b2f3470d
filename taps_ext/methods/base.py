"""MethodConfig: the frozen settings of one method, and the plan it makes for one base model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ..errors import ConfigError, suggestion
from ..scan import Scan

_Config = TypeVar("_Config", bound="MethodConfig")
_METHODS: dict[str, type[MethodConfig]] = {}


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """One layer's part: whether it has a Delta, whether its gate is learned, and how it starts.

    `weight`: it has a weight of its own instead of a Delta (only with a fixed gate). `held`: False where a closed
    layer's Delta is zero and takes no memory until somebody trains on it.
    """

    delta: bool
    learn: bool
    open: bool
    bias: bool = False
    weight: bool = False
    threshold: float = 0.1
    score_init: float = 0.15
    held: bool = True


@dataclass
class Plan:
    """What a task adds: gates by layer name, and the modules that get their own tensors."""

    gates: dict[str, GateSpec] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def register_method(name: str) -> Any:
    """Class decorator: make a MethodConfig known under `name` (in files and on the command line)."""

    def register(cls: type[_Config]) -> type[_Config]:
        if name in _METHODS:
            raise ConfigError(f"register_method: {name!r} is already {_METHODS[name].__name__}")
        cls.method = name
        _METHODS[name] = cls
        return cls

    return register


def tuple_of_str(value: Any, argument: str) -> tuple[str, ...] | None:
    """Normalise a list of glob patterns; a bare string is refused, being almost always a slip."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{argument}: expected a list of patterns or None, got {value!r}")
    return tuple(value)


def one_of(value: Any, choices: tuple[str, ...], argument: str) -> None:
    if value not in choices:
        hint = suggestion(str(value), choices)
        raise ConfigError(f"{argument}: expected one of {list(choices)}, got {value!r}{hint}")


def number(value: Any, argument: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and math.isfinite(value)
    )
    if not good or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{argument}: expected a number in {bracket}{low}, {high}], got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of all method settings: immutable, keyword-only, with an exact JSON round trip."""

    method: ClassVar[str] = ""

    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, tuple_of_str(getattr(self, name), name))

    def plan(self, scan: Scan) -> Plan:
        """What a task of this method adds to a base of these modules. Every method defines it."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, `method` first."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "method": self.method,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
        }

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> MethodConfig:
        """Inverse of `to_dict`. Unknown methods and keys are errors with a suggestion."""
        settings = dict(settings)
        method = settings.pop("method", None)
        if method not in _METHODS:
            hint = suggestion(str(method), _METHODS)
            raise ConfigError(f"method: expected one of {sorted(_METHODS)}, got {method!r}{hint}")
        cls = _METHODS[method]
        fields = dataclasses.fields(cls)
        known = [f.name for f in fields]
        for key in settings:
            if key not in known:
                raise ConfigError(f"{method}: unknown key {key!r}{suggestion(key, known)}; known: {known}")
        for f in fields:
            missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if missing and f.name not in settings:
                raise ConfigError(f"{method}: expected a value for {f.name!r}, got none")
        try:
            return cls(**settings)
        except TypeError as error:
            raise ConfigError(f"{method}: {error}") from None
