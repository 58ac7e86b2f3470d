"""Hosts: the base modules that parts stand on, and what each of them multiplies with.

A host is read, never changed. `op_of` says which product a linear or convolution layer is, so that parts need not ask.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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
    "_taps_weights",
    "_taps_owner",
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


def is_setting(value: Any) -> bool:
    """True for what a method of a module sets to be a setting of it (`grad_checkpointing`), and no cache of tensors."""
    if isinstance(value, (nn.Module, Tensor)):
        return False
    return value is None or isinstance(value, (bool, int, float, str)) or callable(value)


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


# To compilers a module is what it has; this one has nothing, and is an object like others.
_Host: Any = nn.Module if TYPE_CHECKING else object


class Slot(_Host):
    """One weight tensor of a module that is no layer of a weight and a bias alone (a recurrent layer, the experts of a
    mixture): what a part over it has for a host.

    Args:
        owner: the module. key: the tensor's name in it.
    """

    def __init__(self, owner: nn.Module, key: str) -> None:
        self.owner, self.key = owner, key

    @property
    def _parameters(self) -> Any:
        return self.owner._parameters

    @property
    def _forward_pre_hooks(self) -> Any:
        return self.owner._forward_pre_hooks

    @property
    def training(self) -> bool:
        training: bool = self.owner.training
        return training

    def __repr__(self) -> str:
        return f"{type(self.owner).__name__}.{self.key}"


def owner_of(host: nn.Module) -> nn.Module:
    """The module of the base that holds a host's weight: the host itself, but for a :class:`Slot`."""
    return host.owner if isinstance(host, Slot) else host


def host_of(base: nn.Module, name: str) -> nn.Module:
    """What a part called `name` stands on: a module, or one weight of a module.

    Raises:
        AttributeError: there is neither.
    """
    parent, _, key = name.rpartition(".")
    try:
        return base.get_submodule(name)
    except AttributeError:
        owner = base.get_submodule(parent)
        if owner._parameters.get(key) is None:
            raise
        return Slot(owner, key)


def hosts_by_name(base: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The name of every module and of every parameter -> the module, and "" or the parameter's name in it; in module
    order, a module before its parameters."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in base.named_modules():
        found[name] = module, ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(f"{name}.{key}" if name else key, (module, key))
    return found


def weight_name(host: nn.Module) -> str:
    """The attribute that holds the weight of a layer that can be gated."""
    if isinstance(host, Slot):
        return host.key
    return "in_proj_weight" if isinstance(host, nn.MultiheadAttention) else "weight"


def weight_of(name: str, host: nn.Module) -> str:
    """The full name in the base of the weight of a host called `name`."""
    return name if isinstance(host, Slot) else f"{name}.{weight_name(host)}" if name else weight_name(host)


def bias_name(host: nn.Module) -> str:
    """The attribute that holds its bias; "" where it has none of its own."""
    if isinstance(host, Slot):
        return ""
    return "in_proj_bias" if isinstance(host, nn.MultiheadAttention) else "bias"


def alone(host: nn.Module) -> bool:
    """True if its weight, and its bias if it has one, are all the parameters that a module has of its own."""
    names = (weight_name(host), bias_name(host))
    own = [key for key, parameter in host._parameters.items() if parameter is not None]
    return names[0] in own and all(key in names for key in own)


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
    weight: Tensor = held(owner_of(host), weight_name(host))
    return weight


def base_bias(host: nn.Module) -> Tensor | None:
    """The base's own bias, whatever task is running."""
    name = bias_name(host)
    if not name or (not isinstance(host, GATED_TYPES) and not isinstance(host._parameters.get(name), Tensor)):
        return None
    bias: Tensor | None = held(host, name)
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


def multiplications(host: nn.Module, input: Tensor, output: Tensor) -> int:
    """Of one call of a layer with `input`."""
    weight = base_weight(host)
    if isinstance(host, nn.modules.conv._ConvTransposeNd):
        return input.numel() * weight.shape[1:].numel()
    turned = not isinstance(host, (*GATED_TYPES, nn.modules.conv._ConvNd)) and weight.dim() == 2
    if turned and input.shape[-1:] == weight.shape[:1]:  # [inputs, outputs], as transformers' Conv1D has it
        return input.numel() * weight.shape[1]
    return output.numel() * weight.shape[1:].numel()


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
