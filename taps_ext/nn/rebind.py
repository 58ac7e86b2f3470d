"""What a module keeps of itself beside its tensors, as a shallow copy of it must keep it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..errors import UnsupportedModuleError

_CONTAINERS = (list, tuple, dict)


def rebind(value: Any, clones: Mapping[int, nn.Module], where: str, depth: int = 3) -> Any:
    """A module's attribute with modules, and the owners of methods, replaced by their clones (by id).

    Args:
        where: the attribute, for the error.

    Raises:
        UnsupportedModuleError: a function that closes over such a module: it would go on with the module itself.
    """
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if isinstance(value, MethodType):
        owner = clones.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # empty
                continue
            if isinstance(held, nn.Module) and id(held) in clones:
                raise UnsupportedModuleError(
                    f"{where}: expected a method, got a function that closes over {type(held).__name__}, so that it "
                    "reads that module's tensors whatever task runs; make it a method, or name the module in "
                    "exclude_modules"
                )
        return value
    if isinstance(value, functools.partial) and type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = (rebind(part, clones, where, depth) for part in parts)
        same = func is value.func and args is value.args and keywords is value.keywords
        return value if same else functools.partial(func, *args, **keywords)
    if depth and type(value) in _CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        mapped = [rebind(item, clones, where, depth - 1) for item in items]
        if all(new is old for new, old in zip(mapped, items, strict=True)):
            return value
        return dict(zip(value, mapped, strict=True)) if isinstance(value, dict) else type(value)(mapped)
    return value
