"""TaskTensors: run a module's original forward on a task's own parameters and buffers.

A shallow copy of the host shares its submodules and settings and differs only in its direct tensors, so that
any class with any forward (BatchNormAct2d, LayerNorm2d, a ViT's class token) keeps working, in any thread. What is set
on the host later is set on the copy too; what forward sets stays with the copy, and containers that may be a cache
of tensors are its own.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from .rebind import rebind

# Attributes of a host that mean nothing to its copy: the rest of what `route` leaves there is its own.
ROUTING = ("_taps_class", "_taps_name", "_taps_fused", "_taps_cast", "_taps_mode")
_MACHINERY = frozenset(nn.Module().__dict__)
_UNSEEN = object()

NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


_NORM_NAME = re.compile(r"Norm(\d+d|Act(\d+d)?)?$")


def is_norm(module: nn.Module) -> bool:
    """True for torch's normalisation layers and those that are called so and hold vectors alone (LlamaRMSNorm)."""
    if isinstance(module, NORM_TYPES):
        return True
    held = [tensor for tensor in module._parameters.values() if tensor is not None]
    called = _NORM_NAME.search(type(module).__name__) is not None
    return called and bool(held) and not module._modules and all(tensor.ndim == 1 for tensor in held)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone(memory_format=torch.preserve_format)


def _may_be_cache(value: Any) -> bool:
    """True for a container that holds tensors alone, or nothing yet."""
    held = value.values() if type(value) is dict else value if type(value) in (list, set) else None
    return held is not None and all(isinstance(item, Tensor) for item in held)


def drop_caches(module: nn.Module) -> None:
    """What a module's class does about its caches when it begins to train, where it does something."""
    if type(module).train is nn.Module.train:
        return
    children, mode = module.__dict__["_modules"], module.__dict__["training"]
    module.__dict__["_modules"] = {}  # not theirs
    try:
        module.train(True)
        module.train(mode)
    finally:
        module.__dict__["_modules"] = children


class TaskTensors(nn.Module):
    """A task's own copies of one module's direct parameters and buffers, used in its original forward.

    Args:
        host: the base module. Its tensors are copied in value; it is never changed.
        cls: the class whose forward runs (the host's class before it was routed).
    """

    def __init__(self, host: nn.Module, cls: type[nn.Module] | None = None) -> None:
        super().__init__()
        for name, parameter in host._parameters.items():
            own = _copied(parameter)
            trainable = own is not None and own.is_floating_point()
            self.register_parameter(name, None if own is None else nn.Parameter(own, requires_grad=trainable))
        for name, buffer in host._buffers.items():
            self.register_buffer(name, _copied(buffer), name not in host._non_persistent_buffers_set)
        clone = object.__new__(cls or type(host))
        clone.__dict__.update(_parameters=self._parameters, _buffers=self._buffers)
        # Not submodules: the children of both belong to the base.
        self.__dict__.update(host=host, clone=clone, seen={})
        self.follow()
        self.drop_caches()

    @property
    def host(self) -> nn.Module:
        """The base's module."""
        host: nn.Module = self.__dict__["host"]
        return host

    def forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["clone"].forward(*args, **kwargs)

    @torch.compiler.disable
    def follow(self) -> None:
        """Set on the copy what was set on the host since: settings, children, and the mode (training only if both are
        asked to train)."""
        host, clone, seen = self.__dict__["host"], self.__dict__["clone"], self.__dict__["seen"]
        for key, value in host.__dict__.items():
            if seen.get(key, _UNSEEN) is value:
                continue
            seen[key] = value
            if key not in ROUTING and key not in ("_parameters", "_buffers", "training"):
                clone.__dict__[key] = self._own(key, value)
        if len(seen) > len(host.__dict__):
            for key in [key for key in seen if key not in host.__dict__]:
                del seen[key]
                clone.__dict__.pop(key, None)
        clone.__dict__["training"] = self.training and host.__dict__.get("_taps_mode", True)

    def _own(self, key: str, value: Any) -> Any:
        if key in _MACHINERY:
            return value
        host, clone = self.__dict__["host"], self.__dict__["clone"]
        own = rebind(value, {id(host): clone}, f"{type(clone).__name__}.{key}")
        return copy.copy(own) if _may_be_cache(own) else own

    def drop_caches(self) -> None:
        drop_caches(self.__dict__["clone"])

    def give_caches(self, plain: nn.Module) -> None:
        """A plain module with this task's tensors gets this task's caches, not the base's."""
        for key, value in self.__dict__["clone"].__dict__.items():
            if key not in _MACHINERY and _may_be_cache(value):
                plain.__dict__[key] = copy.copy(value)
        drop_caches(plain)

    def train(self, mode: bool = True) -> TaskTensors:
        super().train(mode)
        self.follow()
        if mode:
            self.drop_caches()
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name: what a task file must hold."""
        return dict(self.state_dict(keep_vars=True))


class TaskNorm(TaskTensors):
    """A task's own normalisation: affine parameters and running statistics (if the module keeps any).

    Raises:
        UnsupportedModuleError: `host` is no normalisation layer.
    """

    def __init__(self, host: nn.Module, cls: type[nn.Module] | None = None) -> None:
        if not is_norm(host):
            raise UnsupportedModuleError(f"host: expected a normalisation layer, got {type(host).__name__}")
        super().__init__(host, cls)
