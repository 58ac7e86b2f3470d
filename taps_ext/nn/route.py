"""Routing: base modules keep their place, tensors and hooks; only their forward asks which task is running.

`route` swaps a module's class for a generated subclass of it and `unroute` swaps it back, so that adapting and
unloading is the identity. `frame.py` says which task that is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from . import forward as _forward
from . import reads
from .frame import Frame, running
from .gated import GatedLayer
from .own import NORM_TYPES


class _Routed(nn.Module):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (original_class(self),), self.__getstate__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name: str = self.__dict__["_taps_name"]
        frame = running(name)
        if frame is None:
            return super().forward(*args, **kwargs)
        frame.entered.add(name)
        part = frame.parts.get(name)
        if part is not None:
            return part(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


def _part_and_frame(module: nn.Module) -> tuple[GatedLayer | None, Frame | None]:
    name: str = module.__dict__["_taps_name"]
    frame = running(name)
    part = None if frame is None else frame.parts.get(name)
    return (part, frame) if isinstance(part, GatedLayer) else (None, None)


def _read_weight(module: nn.Module) -> Any:
    """The base's weight, or during a task's forward the task's (`reads.TaskWeight`)."""
    part, frame = _part_and_frame(module)
    if part is None or frame is None:
        return module._parameters[_forward.weight_name(module)]
    enter = functools.partial(frame.entered.add, module.__dict__["_taps_name"])
    if torch.compiler.is_compiling() or part.merged is not None or reads.rests(part):
        enter()
        return reads.whole_weight(module, part)
    return reads.TaskWeight.of(module, part, enter)


def _read_bias(module: nn.Module) -> Any:
    """The base's bias, or during a task's forward the task's own, if it has one."""
    part, _ = _part_and_frame(module)
    own = None if part is None else part.bias
    return module._parameters[_forward.bias_name(module)] if own is None else own


class _Readable(_Routed):
    """A linear or convolution layer whose weight and bias, when others read them, are the running task's."""

    weight = property(_read_weight)
    bias = property(_read_bias)


class _Reads(_Routed):
    """A layer whose own forward reads its weight: nothing else is needed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part, _ = _part_and_frame(self)
        if part is None:
            return super().forward(*args, **kwargs)
        return super(_Routed, self).forward(*args, **kwargs)


class _RoutedReader(_Reads, _Readable):
    """A linear or convolution layer with a forward of its own."""


class _RoutedAttention(_Reads):
    """`nn.MultiheadAttention`, whose forward hands its projections to a function."""

    in_proj_weight = property(_read_weight)
    in_proj_bias = property(_read_bias)


class _RoutedLayer(_Readable):
    """A linear or convolution layer: closed for a task without a part, its weight cast once under autocast."""

    def forward(self, input: torch.Tensor) -> Any:
        name: str = self.__dict__["_taps_name"]
        frame = running(name)
        if frame is not None:
            frame.entered.add(name)
        part = None if frame is None else frame.parts.get(name)
        if part is not None:
            return part(self, input)
        own: Any = self._parameters
        weight = _forward.resting_weight(self, own["weight"], input)
        return _forward.stock_forward(self, input, weight, own["bias"])


class _RoutedNorm(_Routed):
    """A normalisation layer: the base's own stays in evaluation mode always, also under `.train()`."""

    def train(self, mode: bool = True) -> _RoutedNorm:
        return super().train(False)


class _RoutedAffine(_RoutedNorm):
    """A norm that is its weight and bias alone, so that who reads them can do its work: fused encoder layers do."""

    @property
    def weight(self) -> Any:
        """The base's weight, or during a task's forward the task's."""
        return self._read("weight")

    @property
    def bias(self) -> Any:
        """The base's bias, or during a task's forward the task's."""
        return self._read("bias")

    def _read(self, key: str) -> Any:
        if key not in self._parameters:
            raise AttributeError(f"{original_class(self).__name__!r} object has no attribute {key!r}")
        name: str = self.__dict__["_taps_name"]
        frame = running(name)
        part = None if frame is None else frame.parts.get(name)
        if frame is None or part is None:
            return self._parameters[key]
        frame.entered.add(name)
        return part._parameters[key]


@functools.cache
def _routed_class(cls: Any) -> type[nn.Module]:
    if issubclass(cls, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        router: type[nn.Module] = _RoutedAffine
    elif issubclass(cls, NORM_TYPES):
        router = _RoutedNorm
    elif cls.forward in (nn.Linear.forward, nn.Conv2d.forward) and issubclass(cls, _forward.GATED_TYPES):
        router = _RoutedLayer
    elif issubclass(cls, nn.MultiheadAttention):
        router = _RoutedAttention
    elif issubclass(cls, _forward.GATED_TYPES):
        router = _RoutedReader
    else:
        router = _Routed
    return type(cls.__name__, (router, cls), {"__module__": cls.__module__})


def route(module: nn.Module, name: str) -> None:
    """Make `module` ask the running task for its part called `name`."""
    if not isinstance(module, _Routed):
        module.__dict__["_taps_class"] = type(module)
        module.__dict__["_taps_name"] = name
        cls: Any = type(module)
        module.__class__ = _routed_class(cls)
        if isinstance(module, _RoutedNorm):
            module.training = False


def is_routed(module: nn.Module) -> bool:
    """True between `route` and `unroute`."""
    return isinstance(module, _Routed)


def _rebuild(cls: Any) -> nn.Module:
    """An empty routed module, for copying and pickling."""
    module: nn.Module = object.__new__(_routed_class(cls))
    return module


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before it was routed."""
    return module.__dict__.get("_taps_class", type(module))


def unroute(module: nn.Module) -> None:
    """Undo `route`, leaving nothing behind."""
    if isinstance(module, _Routed):
        module.__class__ = module.__dict__.pop("_taps_class")
        module.__dict__.pop("_taps_name")
        module.__dict__.pop("_taps_cast", None)
