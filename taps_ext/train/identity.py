"""What tells one run from another: datasets, functions and transforms as JSON-ready values."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..store import fingerprint


def describe(value: Any, depth: int = 6) -> Any:
    """A setting as JSON: numbers and text as they are, tensors and arrays by their digest, functions and objects by
    their qualified name and what they hold (arguments of a partial, closures, attributes).

    Of a function made on the spot (a lambda, a local one) the code and what it closes over count too; of a method only
    its name, since its owner may be the experiment itself.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (PurePath, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Tensor):
        return fingerprint({"": value})
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, Mapping):
        return {str(key): describe(item, depth) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, depth) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((describe(item, depth) for item in value), key=json.dumps)
    return _object(value, depth)


def _object(value: Any, depth: int) -> Any:
    owner = value if hasattr(value, "__qualname__") else type(value)
    name = f"{owner.__module__}.{owner.__qualname__}"
    if not depth:
        return name
    if isinstance(value, functools.partial):
        held: dict[str, Any] = {"func": value.func, "args": value.args, "keywords": value.keywords}
    elif isinstance(value, FunctionType) and "<" in value.__qualname__:
        code = hashlib.sha256(value.__code__.co_code).hexdigest()
        named = [code, value.__code__.co_names, value.__code__.co_consts]
        held = {"defaults": value.__defaults__, "closure": _closure(value), "code": _constants(named)}
    elif owner is value:
        return name
    else:
        held = {key: item for key, item in getattr(value, "__dict__", {}).items() if key != "training"}
    described = {key: describe(item, depth - 1) for key, item in held.items()}
    described = {key: item for key, item in described.items() if item not in (None, {}, [])}
    return [name, described] if described else name


def _closure(function: FunctionType) -> Any:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # empty
            found.append(None)
    return _constants(found)


def _constants(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """The values that stay as they are; of others, which a run may write to (a list that it appends to), the type."""
    lasting = (bool, int, float, str, Tensor, np.ndarray, np.generic, FunctionType, MethodType, functools.partial)
    return [
        value
        if value is None or isinstance(value, lasting)
        else _constants(value)
        if isinstance(value, tuple)
        else type(value).__qualname__
        for value in values
    ]
