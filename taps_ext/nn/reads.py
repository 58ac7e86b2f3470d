"""Weights that are read instead of run: what code outside a layer's own forward sees during a task's forward.

torchvision's Swin hands `self.qkv.weight` to a function; timm's `Conv2dSame` has a forward of its own. A routed
layer's `weight` is a property that gives such readers the task's weight: :class:`TaskWeight`, which `F.linear` and
`F.conv2d` recognise and run as the gated ops, and which becomes the tensor `W + g * Delta` for anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ..errors import UnsupportedModuleError
from . import sampling
from .forward import base_weight, resting_weight, whole_weight
from .sampling import Sample


def _learns(layer: Any) -> bool:
    return layer.score is not None and layer.score.requires_grad


def rests(host: nn.Module, layer: Any) -> bool:
    """True where a reader may have the base's own weight: closed, no gradient of its score, no cast to be kept.

    In training a reader may hold the weight until gradients are on; in evaluation fused paths want plain tensors.
    """
    if reference.transformed(layer.score, layer.delta, layer.whole):
        return False
    if layer.whole is not None:
        closed = not layer.whole.requires_grad
    else:
        learns = _learns(layer) and (host.training or torch.is_grad_enabled())
        closed = (layer.delta is None and not layer.owed) or (layer.gate is False and not learns)
    return closed and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda")


def read_weight(host: nn.Module, layer: Any) -> Tensor:
    """W + g * Delta as a tensor, differentiable in Delta and the score; a closed one is W itself, not a copy."""
    if layer.whole is not None:
        return whole_weight(layer)
    weight = base_weight(host)
    learns = (_learns(layer) and torch.is_grad_enabled()) or reference.transformed(layer.score)
    if layer.owed and learns:  # as a zero Delta would: torch picks some products by that flag
        return weight.detach().requires_grad_()
    if layer.delta is None or (layer.gate is False and not learns):
        return weight
    make = ops.unread_weight if layer.gate is False else ops.effective_weight
    return make(weight, layer.delta, layer.score, gate=layer.gate, threshold=layer.threshold)


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
    """A gated layer's weight as its readers see it: the facts of W, the values of W + g * Delta.

    As an input of an `autograd.Function` (or of reentrant checkpointing) it is a node of its own, whose gradient
    goes to Delta and the score; everything else comes through `__torch_function__`.
    """

    _host: nn.Module
    _layer: Any
    _enter: Callable[[], None]
    _sample: Sample | None

    @staticmethod
    def of(host: nn.Module, layer: Any, enter: Callable[[], None], sample: Sample | None = None) -> TaskWeight:
        """`enter` is called when the values are used; asking for the dtype is no use."""
        weight = base_weight(host)
        if layer.whole is not None:
            node = whole_weight(layer)
        elif layer.delta is not None and torch.is_grad_enabled() and (layer.delta.requires_grad or _learns(layer)):
            node = ops.unread_weight(weight, layer.delta, layer.score, gate=layer.gate, threshold=layer.threshold)
        else:
            node = weight.detach().requires_grad_(layer.owed and _learns(layer) and torch.is_grad_enabled())
        weight = node.as_subclass(TaskWeight)
        weight._host, weight._layer, weight._enter, weight._sample = host, layer, enter, sample
        return weight

    def _whole(self) -> Tensor:
        self._enter()
        return read_weight(self._host, self._layer)

    def _gated(self, op: Callable[..., Tensor], trailing: int, input: Tensor, bias: Any, *geometry: Any) -> Tensor:
        self._enter()
        layer, weight = self._layer, base_weight(self._host)
        gate, threshold = layer.gate, layer.threshold
        if gate is False:
            weight = resting_weight(self._host, weight, input)
        tensors = (input, weight, layer.delta, layer.score, bias)
        return sampling.run(op, trailing, self._sample, *tensors, *geometry, gate=gate, threshold=threshold)

    @staticmethod
    def _name_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        weight = next(value for value in (*args, kwargs.get("out")) if isinstance(value, TaskWeight))
        name: str = weight._host.__dict__.get("_taps_name", type(weight._host).__name__)
        return name

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            raise UnsupportedModuleError(
                f"{cls._name_of(args, kwargs)}: its weight is written to in the model's forward ({func.__name__}), "
                "which would change the base, not the task; write to it outside, or name the layer in exclude_modules"
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


def _is_gated(weight: Any) -> bool:
    return isinstance(weight, TaskWeight) and weight._layer.whole is None and weight._layer.delta is not None


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if _is_gated(weight):
        return weight._gated(ops.gated_linear, 1, _plain(input), _plain(bias))
    return F.linear(_plain(input), _plain(weight), _plain(bias))


def _conv2d(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    geometry = (stride, padding, dilation, groups)
    if _is_gated(weight):
        return weight._gated(ops.gated_conv2d, 3, _plain(input), _plain(bias), *geometry)
    return F.conv2d(_plain(input), _plain(weight), _plain(bias), *geometry)
