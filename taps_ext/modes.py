"""The base's flags: as they were before adapting, and which modules ask for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn


def _functions(value: Any, depth: int = 4) -> Iterator[CodeType]:
    """The code of a function, a method, a property, and of what they wrap."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        for function in (value.fget, value.fset):
            yield from _functions(function, depth)
    if isinstance(value, functools.partial):
        yield from _functions(value.func, depth)
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType):
        yield code
        for cell in (getattr(value, "__closure__", None) or ()) if depth else ():
            try:
                yield from _functions(cell.cell_contents, depth - 1)
            except ValueError:  # an empty cell
                continue


def _mentions(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return "training" in code.co_names or "training" in code.co_consts or any(map(_mentions, inner))


@functools.cache
def _class_mentions(cls: Any) -> bool:
    own = (value for kind in cls.__mro__ if kind not in (nn.Module, object) for value in vars(kind).values())
    return any(_mentions(code) for value in own for code in _functions(value))


def follows_mode(module: nn.Module) -> bool:
    """True if the module's code reads `training`: what it computes may depend on it."""
    own = (code for value in module.__dict__.values() if callable(value) for code in _functions(value))
    cls: Any = type(module)
    return _class_mentions(cls) or any(map(_mentions, own))


class Flags:
    """The training mode of a base's modules and `requires_grad` of its parameters, as they are now."""

    def __init__(self, base: nn.Module) -> None:
        self.root = base.training  # the base itself is not kept alive by its flags
        self.modes = [(module, module.training) for module in base.modules() if module is not base]
        self.gradients = [(parameter, parameter.requires_grad) for parameter in base.parameters()]

    def restore(self, base: nn.Module) -> None:
        base.training = self.root
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.gradients:
            parameter.requires_grad_(flag)
