"""What a module keeps of itself beside its tensors, as a shallow copy of it must keep it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


def rebind(value: Any, clones: Mapping[int, Any], depth: int = 3) -> Any:
    """A module's attribute with modules and tensors, and the owners of methods, replaced by their clones (by id).

    Also in containers, in partials, and in what functions close over or have as defaults.
    """
    if isinstance(value, (nn.Module, Tensor)):
        return clones.get(id(value), value)
    if isinstance(value, MethodType):
        owner = clones.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if not depth:
        return value
    if isinstance(value, FunctionType):
        return _function(value, clones, depth - 1)
    if type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = (rebind(part, clones, depth - 1) for part in parts)
        same = func is value.func and args is value.args and keywords is value.keywords
        return value if same else functools.partial(func, *args, **keywords)
    if type(value) in (list, tuple, dict):
        items = list(value.values() if isinstance(value, dict) else value)
        mapped = [rebind(item, clones, depth - 1) for item in items]
        if all(new is old for new, old in zip(mapped, items, strict=True)):
            return value
        return dict(zip(value, mapped, strict=True)) if isinstance(value, dict) else type(value)(mapped)
    return value


def _function(function: FunctionType, clones: Mapping[int, Any], depth: int) -> FunctionType:
    """The function itself, or one of the same code that closes over the clones."""
    cells, defaults, named = function.__closure__ or (), function.__defaults__, function.__kwdefaults__
    rebound = tuple(_cell(cell, clones, depth) for cell in cells)
    values, keywords = rebind(defaults, clones, depth), rebind(named, clones, depth)
    if all(new is old for new, old in zip(rebound, cells, strict=True)) and values is defaults and keywords is named:
        return function
    made = FunctionType(function.__code__, function.__globals__, function.__name__, values, rebound)
    made.__kwdefaults__, made.__qualname__ = keywords, function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def _cell(cell: CellType, clones: Mapping[int, Any], depth: int) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # empty
        return cell
    new = rebind(held, clones, depth)
    return cell if new is held else CellType(new)
