"""Hosts: the base modules that parts stand on, and what each of them multiplies with.

A host is read, never changed. `op_of` says which product a linear or convolution layer is, so that parts need not ask.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ops

GATED_TYPES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)  # of the last, the joint input projection

NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

# What routing leaves in a module's `__dict__`; it means nothing to a copy of the module.
ROUTING = (
    "_taps_class",
    "_taps_name",
    "_taps_fused",
    "_taps_gated",
    "_taps_cast",
    "_taps_mode",
    "_taps_set",
    "_taps_sets",
)
ROUTE = "_taps_route"  # what a class is routed by, which the classes made by routing have alone
MACHINERY = frozenset(nn.Module().__dict__)
HOOKS = tuple(sorted(key for key in MACHINERY if key.startswith(("_forward", "_backward")) and "hooks" in key))

_NORM_NAME = re.compile(r"Norm(\d+d|Act(\d+d)?)?$")


def is_norm(module: nn.Module) -> bool:
    """True for torch's normalisation layers and those that are called so and hold vectors alone (LlamaRMSNorm)."""
    if isinstance(module, NORM_TYPES):
        return True
    held = [tensor for tensor in module._parameters.values() if tensor is not None]
    called = _NORM_NAME.search(type(module).__name__) is not None
    return called and bool(held) and not module._modules and all(tensor.ndim == 1 for tensor in held)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without the routing; with what a parametrisation has put on top of it since."""
    before: type[nn.Module] | None = module.__dict__.get("_taps_class")
    if before is None:
        return type(module)
    return before if ROUTE in type(module).__dict__ else _instead(type(module), before)


def reclassed(module: nn.Module) -> bool:
    """True for a module that was given another class after it was routed, as `parametrize` does."""
    return "_taps_class" in module.__dict__ and ROUTE not in type(module).__dict__


def _instead(cls: Any, before: type[nn.Module]) -> Any:
    """A class like `cls`, which derives from a routed one, that derives from `before` in the place of that."""
    if ROUTE in cls.__dict__:
        return before
    bases = tuple(_instead(base, before) if hasattr(base, ROUTE) else base for base in cls.__bases__)
    body = {key: value for key, value in cls.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, body)


def weight_name(host: nn.Module) -> str:
    """The attribute that holds the weight of a layer that can be gated."""
    return "in_proj_weight" if isinstance(host, nn.MultiheadAttention) else "weight"


def bias_name(host: nn.Module) -> str:
    """The attribute that holds its bias."""
    return "in_proj_bias" if isinstance(host, nn.MultiheadAttention) else "bias"


def held(module: nn.Module, key: str) -> Any:
    """A module's own attribute `key`, which routing hides behind a property, wherever the module keeps it."""
    if key in module._parameters:
        return module._parameters[key]
    if "_taps_class" not in module.__dict__:
        return getattr(module, key)  # pruned or parametrised
    if key in module.__dict__:
        return module.__dict__[key]
    parametrised = parametrize.is_parametrized(module, key)  # since it was routed
    return getattr(module, key) if parametrised else nn.Module.__getattr__(module, key)


def base_weight(host: nn.Module) -> Tensor:
    """The base's own weight, whatever task is running."""
    weight: Tensor = held(host, weight_name(host))
    return weight


def base_bias(host: nn.Module) -> Tensor | None:
    """The base's own bias, whatever task is running."""
    bias: Tensor | None = held(host, bias_name(host))
    return bias


def resting_weight(holder: nn.Module, weight: Tensor, input: Tensor) -> Tensor:
    """A weight that does not change, in the type it is multiplied in: under autocast it is cast once and kept."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (weight.requires_grad and torch.is_grad_enabled())
    ):
        return weight
    dtype = ops.autocast_dtype(input)
    if dtype is None or dtype == weight.dtype or weight.is_inference():
        return weight
    key = (dtype, weakref.ref(weight.untyped_storage()), weight.storage_offset(), weight._version)
    kept = holder.__dict__.get("_taps_cast")
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            kept = holder.__dict__["_taps_cast"] = (key, weight.detach().to(dtype))
    return kept[1]


class Op(NamedTuple):
    """A product with a weight: torch's, ours with a gated Delta, the dimensions of an input behind those of the batch,
    and what both take behind the bias."""

    stock: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    trailing: int
    geometry: tuple[Any, ...] = ()


LINEAR = Op(F.linear, ops.gated_linear, 1)


def conv2d(stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Op:
    """The convolution of this geometry."""
    return Op(F.conv2d, ops.gated_conv2d, 3, (stride, padding, dilation, groups))


def op_of(host: nn.Module, input: Tensor) -> tuple[Op, Tensor]:
    """The product of a stock linear or convolution layer, and its input, padded as the layer's padding mode asks."""
    if isinstance(host, nn.Linear):
        return LINEAR, input
    assert isinstance(host, nn.Conv2d)
    if host.padding_mode == "zeros":
        return conv2d(host.stride, host.padding, host.dilation, host.groups), input
    input = F.pad(input, host._reversed_padding_repeated_twice, mode=host.padding_mode)
    return conv2d(host.stride, 0, host.dilation, host.groups), input


def stock_forward(host: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The stock op of `host` on another weight."""
    op, input = op_of(host, input)
    return op.stock(input, weight, bias, *op.geometry)
