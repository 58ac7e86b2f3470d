"""TaskTensors: run a module's original forward on a task's own parameters and buffers.

A shallow copy of the host shares its submodules and settings and differs only in its direct tensors, so that
any class with any forward (BatchNormAct2d, LayerNorm2d, a ViT's class token) keeps working, in any thread. What a user
sets on the host later is set on the copy too; what forward and train set stays with the copy, and containers that may
be a cache of tensors are its own.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TapsError, UnsupportedModuleError
from ..parts import Bound, Part
from . import changes
from .rebind import rebind

# Attributes of a host that mean nothing to its copy: the rest of what `route` leaves there is its own.
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
_MACHINERY = frozenset(nn.Module().__dict__)
HOOKS = tuple(sorted(key for key in _MACHINERY if key.startswith(("_forward", "_backward")) and "hooks" in key))
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
    """True for a container that holds tensors (or tuples of them) alone, or nothing yet."""
    if type(value) not in (dict, OrderedDict, defaultdict, list, deque):
        return False
    items = value.values() if isinstance(value, dict) else value
    return all(isinstance(leaf, Tensor) for item in items for leaf in (item if type(item) is tuple else (item,)))


def shared_containers(base: nn.Module) -> frozenset[int]:
    """The containers (by id) that several modules of the base hold, to speak to each other."""
    found: Counter[int] = Counter()
    for module in base.modules():
        found.update({id(v) for key, v in module.__dict__.items() if _may_be_cache(v) and key not in _MACHINERY})
    return frozenset(one for one, count in found.items() if count > 1)


def _let_train(module: nn.Module, *modes: bool) -> None:
    """What a module's class does when its mode changes (it drops caches, merges weights), but nothing to its children:
    stand-ins take their place."""
    if type(module).train is nn.Module.train:
        return
    from .mirror import Mirror

    stand_in = Mirror().of(module)
    before = dict(stand_in.__dict__)
    for mode in modes:
        stand_in.train(mode)
    for key, value in stand_in.__dict__.items():
        if key not in _MACHINERY and before.get(key, _UNSEEN) is not value:
            module.__dict__[key] = value


class TaskHead(Part):
    """A task's own head, called in the place of the base's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        road = self.instead if stock else self.run
        return road, road

    @property
    def replacement(self) -> nn.Module:
        return self.module

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {"head": list(self.parameters())}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The head, called with what the base's head is called with."""
        return self.module(*args, **kwargs)

    def instead(self, host: nn.Module, input: Tensor, sample: Any) -> Any:
        """The head in the place of a gated layer (`bind.Bound`)."""
        return self.module(input)

    def read(self, key: str) -> Any:
        """The head's tensor in the place of the base's.

        Raises:
            UnsupportedModuleError: it has none of that name.
        """
        found = getattr(self.module, key, self)
        if found is self:
            raise UnsupportedModuleError(
                f"head: expected one with {key!r}, which the base reads outside of its head's forward, "
                f"got a {type(self.module).__name__}"
            )
        return found


class TaskTensors(Part):
    """A task's own copies of one module's direct parameters and buffers, used in its original forward.

    Args:
        host: the base module. Its tensors are copied in value; it is never changed.
        cls: the class whose forward runs (the host's class before it was routed).
        shared: :func:`shared_containers` of the base, which stay shared.
    """

    role = "other"
    group = "values"

    def __init__(
        self, host: nn.Module, cls: type[nn.Module] | None = None, shared: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        for name, parameter in host._parameters.items():
            own = _copied(parameter)
            trainable = own is not None and own.is_floating_point()
            self.register_parameter(name, None if own is None else nn.Parameter(own, requires_grad=trainable))
        for name, buffer in host._buffers.items():
            self.register_buffer(name, _copied(buffer), name not in host._non_persistent_buffers_set)
        clone = object.__new__(cls or type(host))
        # Not submodules: the children of both belong to the base.
        self.__dict__.update(host=host, clone=clone, followed=host.__dict__.get("_taps_sets", 0))
        for key, value in host.__dict__.items():
            if key not in ROUTING:
                clone.__dict__[key] = self._own(key, value, shared)
        clone.__dict__.update(
            _parameters=self._parameters,
            _buffers=self._buffers,
            _non_persistent_buffers_set=self._non_persistent_buffers_set,
        )
        self.take_mode()
        _let_train(clone, True, clone.training)

    @property
    def host(self) -> nn.Module:
        """The base's module."""
        host: nn.Module = self.__dict__["host"]
        return host

    def forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["clone"].forward(*args, **kwargs)

    @torch.compiler.disable
    def follow(self) -> None:
        """Set on the copy what was set on the host since, by its user, and take its mode."""
        sets = self.host.__dict__.get("_taps_sets", 0)
        if sets != self.__dict__["followed"]:
            self.__dict__["followed"] = sets
            for key in list(self.host.__dict__.get("_taps_set", ())):
                if key in self.host.__dict__:
                    self.__dict__["clone"].__dict__[key] = self._own(key, self.host.__dict__[key])
        self.take_mode()  # which may have been assigned, here or there

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":
            changes.note()

    def set(self, key: str, value: Any) -> None:
        """An attribute that another module, or a hook, sets on the host while this task runs."""
        setattr(self.__dict__["clone"], key, value)

    def take_mode(self) -> None:
        """Training only if the task and the host are both asked to train."""
        self.__dict__["clone"].__dict__["training"] = self.training and self.host.__dict__.get("_taps_mode", True)

    def _own(self, key: str, value: Any, shared: frozenset[int] = frozenset()) -> Any:
        if key in _MACHINERY:
            return value
        mine = {**self._parameters, **self._buffers}
        held = {**self.host._parameters, **self.host._buffers}
        clones: dict[int, Any] = {id(tensor): mine[name] for name, tensor in held.items() if tensor is not None}
        own = rebind(value, {**clones, id(self.host): self.__dict__["clone"]})
        return copy.copy(own) if _may_be_cache(own) and id(value) not in shared else own

    def drop_caches(self) -> None:
        """After values were loaded: what is kept was made of others."""
        clone = self.__dict__["clone"]
        _let_train(clone, True, clone.training)

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        road = self.__dict__["clone"].forward
        return road, road

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {self.role: list(self.parameters())}

    def values(self, host: nn.Module) -> dict[str, Tensor]:
        named = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def hand_over(self, plain: nn.Module) -> None:
        self.follow()
        for key, value in self.__dict__["clone"].__dict__.items():
            kept = isinstance(value, (bool, int, float, str, Tensor)) or value is None or _may_be_cache(value)
            if kept and key not in _MACHINERY and value is not self.host.__dict__.get(key, _UNSEEN):
                plain.__dict__[key] = copy.copy(value)

    def train(self, mode: bool = True) -> TaskTensors:
        super().train(mode)
        self.take_mode()
        clone = self.__dict__["clone"]
        _let_train(clone, clone.training)
        return self

    def stored(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers."""
        return dict(self.state_dict(keep_vars=True))

    def lost(self) -> list[str]:
        for key, buffer in self._buffers.items():
            lasting = key not in self._non_persistent_buffers_set
            if lasting and buffer is not None and self.host._buffers.get(key) is None:
                raise TapsError(
                    f"its buffer {key} was None when the task was added, so that a fresh base has no place for it; run "
                    "the base once before it is adapted"
                )
        cls = self.host.__dict__.get("_taps_class", type(self.host))
        lost = ["extra state"] if cls.get_extra_state is not nn.Module.get_extra_state else []
        for key in self._non_persistent_buffers_set:
            own, base = self._buffers.get(key), self.host._buffers.get(key)
            if own is not None and base is not None and not torch.equal(own, base):
                lost.append(f"a buffer {key} that is not persistent and has changed")
        return lost


class TaskNorm(TaskTensors):
    """A task's own normalisation: affine parameters and running statistics (if the module keeps any).

    Raises:
        UnsupportedModuleError: `host` is no normalisation layer.
    """

    role = "norm"
    group = "norms"

    def __init__(
        self, host: nn.Module, cls: type[nn.Module] | None = None, shared: frozenset[int] = frozenset()
    ) -> None:
        if not is_norm(host):
            raise UnsupportedModuleError(f"host: expected a normalisation layer, got {type(host).__name__}")
        super().__init__(host, cls, shared)
