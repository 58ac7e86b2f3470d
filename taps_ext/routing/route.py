"""Routing: base modules keep their place, tensors and hooks; only their forward asks which task is running.

`route` swaps a module's class for a generated subclass of it and `unroute` swaps it back, so that adapting and
unloading is the identity. `frame.py` says which task that is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from .. import reference
from ..errors import UnsupportedModuleError
from ..parts import Part, making, reads, token
from ..parts.host import (
    GATED_TYPES,
    NORM_TYPES,
    ROUTING,
    Slot,
    alone,
    bias_name,
    held,
    is_setting,
    original_class,
    resting_weight,
    stock_forward,
    weight_name,
)
from ..parts.part import Below, forward_of
from .frame import Frame, current, enter, in_backward, leave, running
from .ready import misplaced

# Set while a module's own train() runs, whose settings are not its user's.
_own_code: ContextVar[bool] = ContextVar("taps_ext_own_code", default=False)


# The mode that a whole TaskModel is changing to, or None.
_mode: ContextVar[bool | None] = ContextVar("taps_ext_mode", default=None)


@contextmanager
def whole_model(mode: bool) -> Iterator[None]:
    """Around `train(mode)` of a TaskModel."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def _set_by_user() -> bool:
    """True outside of forwards, backwards and train()."""
    return not _own_code.get() and current() is None and not in_backward()


def _stack(module: nn.Module, frame: Frame | None) -> tuple[Any, ...]:
    """The parts that the running task has over a routed module, the lowest first."""
    return () if frame is None else frame.stacks.get(module.__dict__.get("_taps_name", ""), ())


def _below(host: nn.Module, frame: Frame, stack: tuple[Any, ...]) -> Below:
    """What the uppermost part of a stack stands on in this forward, over a module or one weight of a module."""
    ready, name = frame.ready, host.__dict__.get("_taps_name", "")
    if ready is None or is_compiling() or name not in ready:
        return Below(host, stack[:-1], frame.sample)
    return Below(host, stack[:-1], frame.sample, functools.partial(ready.of, name, host, stack[-1]))


class _Routed(nn.Module):
    """A module whose tensors a task may replace."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What a module's class keeps of its subclasses does not hear of the routed one."""

    _always_rests = False  # the base's own is in evaluation mode, also under `.train()`
    _taps_weights: Mapping[str, tuple[str, nn.Module]] = {}  # a weight's name here -> of its parts, and their host

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__getstate__().items() if key not in ("_taps_cast", "_taps_owner")}
        return _rebuild, (original_class(self), *type(self)._taps_route), state  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> _Routed:
        # Whether its tasks may train. When the whole model rests, their parts know that by themselves.
        self.__dict__["_taps_mode"] = mode or _mode.get() is False
        self.__dict__["_taps_sets"] = self.__dict__.get("_taps_sets", 0) + 1
        token.note()
        before = _own_code.set(True)
        try:
            return super().train(mode and not self._always_rests)
        finally:
            _own_code.reset(before)
            for part in _stack(self, running(self)):
                part.mode()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_buffers", ()) and not is_compiling():  # `self.steps += 1` in a method
            frame = current()
            stack = _stack(self, frame)
            if stack and stack[-1].sets(name, value):
                return
            if frame is not None and frame.mixture is not None and frame.mixture.sets(self, name, value):
                return
        super().__setattr__(name, value)
        if name not in self.__dict__:
            return
        token.note()
        if name == "training":
            return
        frame = running(self)
        stack = _stack(self, frame)
        # Of a method that has run nothing yet: it is there to set this.
        for_all = frame is not None and frame.method and not frame.entered and is_setting(value)
        taken = stack and stack[-1].sets(name, value)
        if (for_all or (not taken and _set_by_user())) and not torch.compiler.is_compiling():
            self.__dict__["_taps_set"] = {**self.__dict__.get("_taps_set", {}), name: None}
            self.__dict__["_taps_sets"] = self.__dict__.get("_taps_sets", 0) + 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        token.note()  # a parameter may have gone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame = current() or running(self, runs=True)
        if frame is None:
            return super().forward(*args, **kwargs)
        if frame.mixture is not None:
            return frame.mixture.run(self, frame, super().forward, args, kwargs)
        name: str = self.__dict__["_taps_name"]
        if self._taps_weights and (over := _over(self, frame)):
            if all(found != name for found, _ in self._taps_weights.values()):
                frame.entered.add(name)
            if is_compiling() or reference.may_be_transformed():  # its weights are read one by one
                return super().forward(*args, **kwargs)
            return making.run(super().forward, over, frame, args, kwargs)
        frame.entered.add(name)
        placed = frame.bound.get(name)
        if placed is not None and not is_compiling():
            bound, host = placed
            if host != id(self):
                raise misplaced(name)
            return bound[torch.is_grad_enabled()](*args, **kwargs)
        stack = frame.stacks.get(name)
        if stack and not stack[-1].runs_host:
            return forward_of(stack[-1])(_below(self, frame, stack), *args, **kwargs)
        return super().forward(*args, **kwargs)


def _over(module: _Routed, frame: Frame) -> list[tuple[Any, Below]]:
    """The uppermost part over each weight of a module that is multiplied by the module's own forward."""
    found = []
    for name, host in module._taps_weights.values():
        stack = frame.stacks.get(name)
        if stack:
            found.append((stack[-1], _below(host, frame, stack)))
    return found


def _property(key: str, read: Callable[[nn.Module], Any]) -> property:
    """`read` as the attribute `key`; what others set or delete there is the module's own."""

    def write(module: nn.Module, value: Any) -> None:
        kept: Any = module._parameters if key in module._parameters else module._buffers
        if key in kept and (value is None or isinstance(value, torch.Tensor)):
            kept[key] = value
        else:
            module.__dict__[key] = value

    def delete(module: nn.Module) -> None:
        for kept in (module.__dict__, module._parameters, module._buffers):
            if key in kept:
                del kept[key]
                return
        raise AttributeError(key)

    return property(read, write, delete, doc="The base's own, or during a task's forward the task's.")


def _read(key: str, module: nn.Module) -> Any:
    """The base's own tensor, or during a task's forward the task's.

    A method that is not forward reads it, or someone else (fused encoder layers, whoever indexes a ParameterList).
    """
    slots: Mapping[str, tuple[str, nn.Module]] = module.__dict__.get("_taps_weights", {})
    frame = running(module)
    if frame is not None and frame.mixture is not None:
        return _read_mixed(key, module, slots.get(key), frame)
    if key in slots and frame is not None:
        made = making.made()
        if made.frame is frame and (weight := made.weights.get((id(module), key))) is not None:
            frame.entered.add(slots[key][0])
            return weight
    elif key in slots and _mode.get() is not None:
        raise _read_in_mode(slots[key][0])
    if frame is not None and key in slots:
        name, host = slots[key]
        over = frame.stacks.get(name)
        if over and isinstance(host, Slot):
            seen = frame.entered
            found = over[-1].reads(_below(host, frame, over), key, lambda _: seen.add(name), fused=False)
            return held(module, key) if found is NotImplemented else found
    stack = _stack(module, frame)
    if not stack or frame is None:
        return held(module, key)
    enter = functools.partial(_enter, module, frame)
    found = stack[-1].reads(_below(module, frame, stack), key, enter, fused="_taps_fused" in module.__dict__)
    return held(module, key) if found is NotImplemented else found


def _read_mixed(key: str, module: nn.Module, slot: tuple[str, nn.Module] | None, frame: Frame) -> Any:
    """The base's own tensor, of which no task of a batch has another: it is known who uses the values of one."""
    own, mixture = held(module, key), frame.mixture
    name, host = slot or (module.__dict__["_taps_name"], module)
    if own is None or not mixture.touches(name):
        frame.entered.add(name)
        return mixture.buffer(module, key, own) if key in module._buffers else own
    if key == weight_name(host) and type(own) in (torch.Tensor, nn.Parameter):
        return reads.TaskWeight.of(Below(host), Part(), lambda _: mixture.reads(name))
    mixture.reads(name)
    return own


def _enter(module: nn.Module, frame: Frame, key: str) -> None:
    """A reader uses the tensor `key` of a module, or with "" does the module's work. Who has read all parameters may
    have done it."""
    name: str = module.__dict__["_taps_name"]
    if key:
        frame.entered.add(f"{name}.{key}")
        own = [key for key, value in module._parameters.items() if value is not None]
    if not key or all(f"{name}.{other}" in frame.entered for other in own):
        frame.entered.add(name)


# Methods of torch's modules that give their tensors new values.
_RESETS = ("reset_parameters", "_reset_parameters", "reset_running_stats")


def _reset(key: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The statistics of the active task's norm start anew; the base's tensors do not.

    Raises:
        UnsupportedModuleError: anything else that would write to the base.
    """
    method = functools.partial(getattr(original_class(module), key), module, *args, **kwargs)
    if not _set_by_user():  # its own code, which a forward's checks look after
        return method()
    statistics = key == "reset_running_stats"
    if statistics and module._buffers.get("running_mean") is None:
        return method()
    owner = module.__dict__.get("_taps_owner", lambda: None)()
    frame = None if owner is None else owner.active_frame()
    stack = _stack(module, frame)
    if statistics and frame is not None and stack:
        below = _below(module, frame, stack)
        if stack[-1].reads(below, "running_mean", lambda _: None, fused=False) is not NotImplemented:
            entered = enter(frame)
            try:
                return method()
            finally:
                leave(entered)
    advice = "reset it before it is wrapped"
    if statistics:
        advice = "name a task with norms of its own, whose statistics are meant: with model.use_task(name): ..."
    raise UnsupportedModuleError(
        f"{module.__dict__['_taps_name']}: {key} would write to the base, which is frozen; {advice}"
    )


def _resetter(key: str) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: _reset(key, module, *args, **kwargs)


def _read_in_mode(name: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{name}: its weight is read when the model's mode changes, where no task runs: what is made of it there would "
        "serve all tasks; name the layer in exclude_modules"
    )


def _read_weight(module: nn.Module) -> Any:
    """The base's weight, or during a task's forward the task's."""
    if _mode.get() is not None and "_taps_gated" in module.__dict__ and not _stack(module, running(module)):
        raise _read_in_mode(module.__dict__["_taps_name"])
    return _read(weight_name(module), module)


def _read_bias(module: nn.Module) -> Any:
    """The base's bias, or during a task's forward the task's own, if it has one."""
    return _read(bias_name(module), module)


class _Readable(_Routed):
    """A linear or convolution layer whose weight and bias, when others read them, are the running task's."""

    weight = _property("weight", _read_weight)
    bias = _property("bias", _read_bias)


class _Reads(_Routed):
    """A layer whose own forward reads its weight: nothing else is needed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame = running(self, runs=True)
        if frame is not None and frame.mixture is not None:
            return frame.mixture.run(self, frame, super(_Routed, self).forward, args, kwargs)
        stack = _stack(self, frame)
        if not (stack and stack[-1].runs_host):
            return super().forward(*args, **kwargs)
        return super(_Routed, self).forward(*args, **kwargs)


class _RoutedReader(_Reads, _Readable):
    """A linear or convolution layer with a forward of its own."""


class _RoutedAttention(_Reads):
    """`nn.MultiheadAttention`, whose forward hands its projections to a function."""

    in_proj_weight = _property("in_proj_weight", _read_weight)
    in_proj_bias = _property("in_proj_bias", _read_bias)


# What the bindings of gated layers are not made for.
_autocast = torch._C._is_any_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active


class _RoutedLayer(_Readable):
    """A linear or convolution layer: closed for a task without a part, its weight cast once under autocast."""

    def forward(self, input: torch.Tensor) -> Any:
        if not is_compiling():
            frame = current()
            if frame is not None and not _autocast() and not _transforms() and forward_ad._current_level < 0:
                name: str = self.__dict__["_taps_name"]
                placed = frame.bound.get(name)
                if placed is not None:
                    bound, host = placed
                    if host != id(self):
                        raise misplaced(name)
                    frame.entered.add(name)
                    return bound[torch.is_grad_enabled()](self, input, frame.sample)
        return self._taps_general(input)

    def _taps_general(self, input: torch.Tensor) -> Any:
        name: str = self.__dict__["_taps_name"]
        frame = running(self)
        if frame is not None:
            if frame.mixture is not None:
                return frame.mixture.run(self, frame, self._taps_base, (input,), {})
            frame.entered.add(name)
        stack = _stack(self, frame)
        if stack and frame is not None:
            return forward_of(stack[-1])(_below(self, frame, stack), input)
        return self._taps_base(input)

    def _taps_base(self, input: torch.Tensor) -> Any:
        weight = resting_weight(self, held(self, "weight"), input)
        return stock_forward(self, input, weight, held(self, "bias"))


class _RoutedNorm(_Routed):
    """A normalisation layer: the base's own stays in evaluation mode always."""

    _always_rests = True


class _RoutedRecurrent(_Routed):
    """A recurrent layer, which keeps its weights in a list beside its parameters."""

    def _flat(self) -> list[Any]:
        kept: list[Any] = self.__dict__["_flat_weights"]
        if current() is None and running(self) is None:
            return kept
        names = self.__dict__["_flat_weights_names"]
        return [_read(name, self) if name in self._parameters else own for name, own in zip(names, kept, strict=True)]

    def _set_flat(self, value: list[Any]) -> None:
        self.__dict__["_flat_weights"] = value

    _flat_weights = property(_flat, _set_flat, doc="The base's own, or during a task's forward the task's.")


def _own_tensors(module: nn.Module, router: Any) -> tuple[str, ...]:
    """The tensors that are to be read through :func:`_read`: all that no other class attribute stands for."""
    if router not in (_Routed, _RoutedNorm, _RoutedRecurrent) or parametrize.is_parametrized(module):
        return ()
    held = (*module._parameters, *module._buffers)
    return tuple(key for key in held if not hasattr(type(module), key))


def _router(module: nn.Module) -> Any:
    """The routing class for a module, by what it is and by where it keeps its weights."""
    held = module._parameters
    plain = not parametrize.is_parametrized(module)
    if isinstance(module, NORM_TYPES):
        return _RoutedNorm
    if isinstance(module, nn.RNNBase) and plain:
        return _RoutedRecurrent
    if not isinstance(module, GATED_TYPES) or not plain:
        return _Routed
    if not alone(module) or bias_name(module) not in held:
        return _Routed
    if isinstance(module, nn.MultiheadAttention):
        return _RoutedAttention
    cls: Any = type(module)
    if cls.forward is nn.Linear.forward:
        return _RoutedLayer
    stock = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward
    return _RoutedLayer if stock else _RoutedReader


@functools.cache
def _routed_class(cls: Any, router: Any, keys: tuple[str, ...]) -> type[nn.Module]:
    reads = {key: _property(key, functools.partial(_read, key)) for key in keys}
    resets = {key: _resetter(key) for key in _RESETS if hasattr(cls, key)}
    return type(
        cls.__name__, (router, cls), {"__module__": cls.__module__, "_taps_route": (router, keys), **reads, **resets}
    )


def route(module: nn.Module, name: str, *, fused: bool = False) -> None:
    """Make `module` ask the running task for its part called `name`.

    `fused`: its weights are read by `nn.TransformerEncoderLayer`, whose fused path takes plain tensors alone.
    """
    if not isinstance(module, _Routed):
        kind: Any = type(module)
        router = _router(module)
        cls = _routed_class(kind, router, _own_tensors(module, router))
        module.__dict__["_taps_class"] = kind
        module.__dict__["_taps_name"] = name
        if fused:
            module.__dict__["_taps_fused"] = True
        module.__class__ = cls
        if isinstance(module, _Routed) and module._always_rests:
            module.training = False


def gated(module: nn.Module, name: str, host: nn.Module) -> None:
    """Remember that parts called `name` may change a weight of a routed module. `host`: the module, or its slot."""
    module.__dict__["_taps_gated"] = True
    if isinstance(module, _Routed) and type(module)._taps_route[0] in (_Routed, _RoutedRecurrent):  # type: ignore[attr-defined]
        module.__dict__["_taps_weights"] = {**module._taps_weights, weight_name(host): (name, host)}


def claim(base: nn.Module, owner: nn.Module) -> None:
    """Tell the routed modules of a base whose tasks stand on them."""
    found = weakref.ref(owner)
    for module in base.modules():
        if isinstance(module, _Routed):
            module.__dict__["_taps_owner"] = found


def is_stock(module: nn.Module) -> bool:
    """True for a routed linear or convolution layer with the stock forward, whose bindings are called with more."""
    return isinstance(module, _RoutedLayer)


def is_routed(module: nn.Module) -> bool:
    """True between `route` and `unroute`."""
    return isinstance(module, _Routed)


def _rebuild(cls: Any, router: Any, keys: tuple[str, ...]) -> nn.Module:
    """An empty routed module, for copying and pickling."""
    module: nn.Module = object.__new__(_routed_class(cls, router, keys))
    return module


def unroute(module: nn.Module) -> None:
    """Undo `route`, leaving nothing behind."""
    if isinstance(module, _Routed):
        kind: Any = original_class(module)
        module.__class__ = kind
        for key in ROUTING:
            module.__dict__.pop(key, None)
