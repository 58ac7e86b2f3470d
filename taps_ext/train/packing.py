"""States of other people's objects as JSON and tensors: no pickle, and what cannot be kept is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError

_KINDS = {"list": list, "tuple": tuple}


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value as JSON: numbers and text as they are, tensors moved to `tensors` under names that begin with `name`.

    Raises:
        ConfigError: something other than numbers, text, tensors, and lists, tuples and dictionaries of such; `name` is
            where it lies.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (int, float)):  # NumPy's float64, an enumeration's value
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return ["tensor", name]
    if type(value) in (list, tuple):
        return [type(value).__name__, [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]]
    if isinstance(value, (dict, Mapping)):
        kind = "counter" if isinstance(value, Counter) else "dict"
        for key in value:
            if type(key) not in (bool, int, float, str):
                raise ConfigError(f"{name}: expected keys that JSON holds, got {type(key).__name__}")
        return [kind, [[key, pack(item, tensors, f"{name}.{key}")] for key, item in value.items()]]
    raise ConfigError(
        f"{name}: expected numbers, text, tensors, or lists and dictionaries of such, so that a run can be resumed, "
        f"got {type(value).__name__}"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`pack`. Raises KeyError, TypeError or ValueError for what pack never gives."""
    if not isinstance(packed, list):
        return packed
    kind, content = packed
    if kind == "tensor":
        return tensors[content]
    if kind in _KINDS:
        return _KINDS[kind](unpack(item, tensors) for item in content)
    made = {key: unpack(item, tensors) for key, item in content}
    return Counter(made) if kind == "counter" else made
