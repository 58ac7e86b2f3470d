"""MethodConfig: the frozen settings of one method, and the parts that its tasks have over one base model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..base.scan import Scan
from ..errors import ConfigError, TapsError, suggestion
from ..parts import Part
from ..parts.host import owner_of
from ..parts.sampling import Sample
from .keywords import Keywords

_Config = TypeVar("_Config", bound="MethodConfig")
_METHODS: dict[str, type[MethodConfig]] = {}


def register_method(name: str) -> Any:
    """Class decorator: make a MethodConfig known under `name` (in files and on the command line)."""

    def register(cls: type[_Config]) -> type[_Config]:
        if name in _METHODS:
            raise ConfigError(f"register_method: {name!r} is already {_METHODS[name].__name__}")
        cls.method = name
        _METHODS[name] = cls
        return cls

    return register


def registered() -> Mapping[str, type[MethodConfig]]:
    """The known methods by name, as they are at any time; read only."""
    return MappingProxyType(_METHODS)


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


_LARGEST = torch.finfo(torch.float32).max  # what a setting is used as


def number(value: Any, argument: str, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and abs(value) <= _LARGEST
    )
    if not good or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{argument}: expected a number in {bracket}{low}, {high}], got {value!r}")


def none_of_these(method: str, base: Scan) -> ConfigError:
    """Of a base, or of a choice of its layers, that holds weights of other kinds alone than a method changes."""
    name, host = next(iter(base.rebuilt.items()))
    return ConfigError(
        f"{method}: expected linear layers or 2-d convolutions, which it changes, got none: {name} is a "
        f"{type(owner_of(host)).__name__}, whose weight TapsConfig and FullConfig change"
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Keywords):
    """Base of all method settings: immutable, keyword-only, with an exact JSON round trip. A misspelt keyword is a
    ConfigError with a suggestion.

    Attributes:
        target_modules: globs of the layers that the method is given; None for all that can be gated.
        exclude_modules: globs of layers and modules to leave to the base.
    """

    method: ClassVar[str] = ""

    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, tuple_of_str(getattr(self, name), name))

    def parts(self, base: Scan) -> dict[str, Part]:
        """One task's parts over the modules of a base, by name; its head comes from :meth:`TaskModel.add_task`. Every
        method defines it, and it is called when a file is loaded, too: to compare."""
        raise TapsError(f"{type(self).__name__}: defines no parts, which every method must")

    def shared(self, base: Scan) -> dict[str, Part]:
        """The parts that all tasks of a family have together, below their own (`TaskModel.save_shared`). They have no
        learned gates."""
        return {}

    def begin(self, base: Scan, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> None:
        """Called once when a task is added, not when it is loaded: for values that depend on what its family holds by
        now, and for warnings."""

    def penalty_of(self, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> Tensor | None:
        """What a task adds to its loss, a scalar; None for nothing. `parts` are the task's, `shared` its family's."""
        return None

    def sample(
        self, parts: Mapping[str, Part], batch: int | None, device: torch.device, *, gates: str = "host"
    ) -> Sample | None:
        """The samples of a training batch that closed layers learn from in one forward; None for all of them.

        Args:
            batch: how many there are, or None where no argument of the forward says so.
            gates: "host" or "device", as :class:`TaskModel`.

        Raises:
            ConfigError: samples are wanted, and cannot be had.
        """
        return None

    @property
    def own_head(self) -> bool:
        """Whether its tasks have a head of their own."""
        return True

    @property
    def samples(self) -> bool:
        """Whether :meth:`sample` is to be asked in training."""
        return False

    def sampled(self, batch: int) -> int:
        """How many of `batch` samples closed layers learn from."""
        return batch

    @staticmethod
    def known(method: Any) -> bool:
        """True for the name of a registered method."""
        return method in _METHODS

    @property
    def family(self) -> str:
        """What the tasks that have the shared parts together are called."""
        return self.method

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
            hint = hint or "; import the package that registers another"
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


@dataclass(frozen=True, kw_only=True)
class UnknownMethod(MethodConfig):
    """The config of a task whose method is not registered here: the task runs, reports, merges and is saved as it was
    read; what only its method can do raises.

    Attributes:
        settings: the config as the file has it.
    """

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "method", str(self.settings.get("method")))  # what reports call it

    def __hash__(self) -> int:
        return hash(json.dumps(self.settings, sort_keys=True))

    def _missing(self, what: str) -> TapsError:
        return TapsError(
            f"{what}: the task's method {self.method!r} is not registered; import the package that registers it"
        )

    def parts(self, base: Scan) -> dict[str, Part]:
        """Raises TapsError."""
        raise self._missing("parts")

    def penalty_of(self, parts: Mapping[str, Part], shared: Mapping[str, Part]) -> Tensor | None:
        """Raises TapsError."""
        raise self._missing("sparsity_loss")

    @property
    def samples(self) -> bool:
        """True, so that training says what is missing."""
        return True

    def sample(
        self, parts: Mapping[str, Part], batch: int | None, device: torch.device, *, gates: str = "host"
    ) -> Sample | None:
        """Raises TapsError."""
        raise self._missing("training")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return dict(self.settings)
