"""Weights that are read instead of run: what code outside a layer's own forward sees during a task's forward.

torchvision's Swin hands `self.qkv.weight` to a function; timm's `Conv2dSame` has a forward of its own. A routed
layer's `weight` is a property that gives such readers the task's weight: :class:`TaskWeight`, which `F.linear` and
`F.conv2d` recognise and run as the part's own product, and which becomes the tensor W_t for anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from .host import LINEAR, Op, base_weight, conv2d
from .part import Below, Part


def weight(below: Below, part: Part, enter: Callable[[str], None], *, fused: bool) -> Tensor:
    """What a reader of the host's weight gets where `part` stands on `below`. `fused`: of torch's fused layers."""
    special = type(base_weight(below.host)) not in (Tensor, nn.Parameter)  # a subclass takes no other
    plain = torch.compiler.is_compiling() or (fused and not torch.is_grad_enabled()) or special
    if plain or part.rests(below):
        enter("")
        return part.weight_over(below)
    return TaskWeight.of(below, part, enter)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


# What asks about a weight without using its values: answered by the base's.
_FACTS: frozenset[Callable[..., Any]] = frozenset(
    [
        *(_getter(name) for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_nested")),
        *(_getter(name) for name in ("requires_grad", "is_quantized", "is_sparse", "is_meta", "itemsize", "nbytes")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "stride", "__len__")),
        *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous", "ndimension")),
    ]
)
_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
)
# What takes size and type alone from some other tensor.
_LIKES: frozenset[Callable[..., Any]] = frozenset(
    [
        *(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
        *(getattr(Tensor, f"new_{name}") for name in ("zeros", "ones", "empty", "full", "tensor", "empty_strided")),
        Tensor.to,
        Tensor.type_as,
    ]
)


class TaskWeight(Tensor):
    """A layer's weight as its readers see it under a task: the facts of W, the values of W_t.

    As an input of an `autograd.Function` (or of reentrant checkpointing) it is a node of its own, whose gradient
    goes to what the task trains; everything else comes through `__torch_function__`.
    """

    _below: Below
    _part: Part
    _enter: Callable[[str], None]

    @staticmethod
    def of(below: Below, part: Part, enter: Callable[[str], None]) -> TaskWeight:
        """`enter` is called when the values are used; asking for the dtype is no use."""
        weight = part.unread(below).as_subclass(TaskWeight)
        weight._below, weight._part, weight._enter = below, part, enter
        return weight

    def _whole(self) -> Tensor:
        self._enter("")
        return self._part.weight_over(self._below)

    def _run(self, op: Op, input: Tensor, bias: Any) -> Tensor:
        self._enter("")
        return self._part.run_over(op, self._below, input, bias)

    @staticmethod
    def _name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        weight = next(value for value in (*args, kwargs.get("out")) if isinstance(value, TaskWeight))
        host = weight._below.host
        name: str = host.__dict__.get("_taps_name", type(host).__name__)
        return name

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            name = cls._name_of(args, kwargs)
            # Who writes to one block's weight writes to all. `base.weights.globs` must know the other layers; here
            # only a number behind a name is taken for a block's.
            alike = re.sub(r"([^.]*[^.\d][^.]*\.)\d+(?=\.)", r"\1*", name)
            raise UnsupportedModuleError(
                f"{name}: its weight is written to in the model's forward ({func.__name__}), which would change the "
                "base, not the task; write to it outside, or, to leave it and what has its name in other blocks "
                f"frozen, name them in exclude_modules ({[alike]})"
            )
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS or (func in _LIKES and _asks(func, args)):
                return func(*args, **kwargs)
            if func is F.linear:
                return _linear(*args, **kwargs)
            if func is F.conv2d:
                return _conv2d(*args, **kwargs)
        return func(*_plain(args), **_plain(kwargs))


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if `func` writes to a TaskWeight: the first argument of what ends in one underscore, or `out`."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    writes = in_place or name in _IN_PLACE or name in ("__setitem__", "__set__")
    target = args[0] if args and writes else kwargs.get("out")
    return isinstance(target, TaskWeight)


def _asks(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """True unless `func` converts the values of its first argument, a TaskWeight."""
    return func not in (Tensor.to, Tensor.type_as) or not isinstance(args[0], TaskWeight)


def _plain(value: Any) -> Any:
    """`value` with every TaskWeight in it made a plain tensor."""
    if isinstance(value, TaskWeight):
        return value._whole()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, TaskWeight):
        return weight._run(LINEAR, _plain(input), _plain(bias))
    return F.linear(_plain(input), _plain(weight), _plain(bias))


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    if isinstance(weight, TaskWeight):
        return weight._run(conv2d(stride, padding, dilation, groups), _plain(input), _plain(bias))
    return F.conv2d(_plain(input), _plain(weight), _plain(bias), stride, padding, dilation, groups)
