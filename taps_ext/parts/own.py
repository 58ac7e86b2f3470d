"""Own: run a module's original forward on a task's own parameters and buffers.

A shallow copy of the host shares its submodules and settings and differs only in its direct tensors, so that
any class with any forward (BatchNormAct2d, LayerNorm2d, a ViT's class token) keeps working, in any thread. What a user
sets on the host later is set on the copy too; what forward and train set stays with the copy, and containers that may
be a cache of tensors are its own.
"""

from __future__ import annotations

import copy
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TapsError, UnsupportedModuleError
from ..store.record import Record
from . import token
from .bind import Bound
from .host import MACHINERY, ROUTING, is_norm, original_class
from .mirror import Mirror
from .part import Below, Part, register_part, saved
from .rebind import rebind

_UNSEEN = object()
_ROLES = ("norm", "other")


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
        found.update({id(v) for key, v in module.__dict__.items() if _may_be_cache(v) and key not in MACHINERY})
    return frozenset(one for one, count in found.items() if count > 1)


def _let_train(module: nn.Module, *modes: bool) -> None:
    """What a module's class does when its mode changes (it drops caches, merges weights), but nothing to its children:
    stand-ins take their place."""
    if type(module).train is nn.Module.train:
        return
    stand_in = Mirror().of(module)
    before = dict(stand_in.__dict__)
    for mode in modes:
        stand_in.train(mode)
    for key, value in stand_in.__dict__.items():
        if key not in MACHINERY and before.get(key, _UNSEEN) is not value:
            module.__dict__[key] = value


@register_part("own")
class Own(Part):
    """A task's own copies of one module's direct parameters and buffers, used in its original forward.

    Args:
        host: the base module. Its tensors are copied in value; it is never changed.
        role: "norm" for a normalisation layer (affine parameters, running statistics), "other" for anything else; by
            default what the module is.
        buffers: False leaves the buffers to the base, and a norm in evaluation mode.
        only: the names of the parameters that are the task's, the others being the base's; None for all.

    Raises:
        UnsupportedModuleError: a traced module; complex parameters; role "norm" and no normalisation layer.
        ValueError: a name in `only` of no parameter.
    """

    def __init__(
        self, host: nn.Module, role: str | None = None, *, buffers: bool = True, only: Collection[str] | None = None
    ) -> None:
        super().__init__()
        if isinstance(host, torch.fx.GraphModule):
            held = [*host._parameters, *host._buffers]
            raise UnsupportedModuleError(f"a traced module that holds {held}; adapt the model that it was traced from")
        mine = {name: p for name, p in host._parameters.items() if only is None or name in only}
        if only is not None and (unknown := sorted({*only} - {name for name, p in mine.items() if p is not None})):
            raise ValueError(f"only: expected names of parameters, {unknown[0]!r} is none")
        if any(p is not None and p.is_complex() for p in mine.values()):
            raise UnsupportedModuleError(
                "holds complex parameters, which no task trains; to leave them frozen, name it in exclude_modules"
            )
        self.role = role or ("norm" if is_norm(host) else "other")
        if self.role == "norm" and not is_norm(host):
            raise UnsupportedModuleError(f"host: expected a normalisation layer, got {type(host).__name__}")
        self.only = None if only is None else list(mine)
        for name, parameter in mine.items():
            own = _copied(parameter)
            trainable = own is not None and own.is_floating_point()
            # Not through `register_parameter`, to which a name of a method of ours is taken.
            self._parameters[name] = None if own is None else nn.Parameter(own, requires_grad=trainable)
        self.buffers_own = buffers
        if buffers:
            self._buffers.update({name: _copied(buffer) for name, buffer in host._buffers.items()})
            self._non_persistent_buffers_set |= host._non_persistent_buffers_set
        # Not submodules: the children of both belong to the base.
        clone = object.__new__(original_class(host))
        self.__dict__.update(host=host, clone=clone, followed=host.__dict__.get("_taps_sets", 0))

    def settle(self, shared: frozenset[int]) -> None:
        clone = self.__dict__["clone"]
        for key, value in self.host.__dict__.items():
            if key not in ROUTING:
                clone.__dict__[key] = self._own(key, value, shared)
        mine = self._parameters  # and the host's behind them as they are at any time
        clone.__dict__.update(
            _parameters=mine if self.only is None else ChainMap(mine, self.host._parameters),
            _buffers=self._buffers if self.buffers_own else self.host._buffers,
            _non_persistent_buffers_set=(self if self.buffers_own else self.host)._non_persistent_buffers_set,
        )
        self.mode()
        _let_train(clone, True, clone.training)

    @property
    def host(self) -> nn.Module:
        """The base's module."""
        host: nn.Module = self.__dict__["host"]
        return host

    def forward(self, below: Below, *args: Any, **kwargs: Any) -> Any:
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
        self.mode()  # which may have been assigned, here or there

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":
            token.note()

    def sets(self, key: str, value: Any) -> bool:
        setattr(self.__dict__["clone"], key, value)  # a forward of its own would set it on the task's copy
        return True

    def mode(self) -> None:
        """Training only if the task and the host are both asked to train."""
        training = self.training and self.buffers_own and self.host.__dict__.get("_taps_mode", True)
        self.__dict__["clone"].__dict__["training"] = training

    def _own(self, key: str, value: Any, shared: frozenset[int] = frozenset()) -> Any:
        if key in MACHINERY:
            return value
        mine = {**self._parameters, **self._buffers}
        held = {**self.host._parameters, **self.host._buffers}
        clones: dict[int, Any] = {
            id(tensor): mine[name] for name, tensor in held.items() if tensor is not None and name in mine
        }
        own = rebind(value, {**clones, id(self.host): self.__dict__["clone"]})
        return copy.copy(own) if _may_be_cache(own) and id(value) not in shared else own

    def drop_caches(self) -> None:
        """After values were loaded: what is kept was made of others."""
        clone = self.__dict__["clone"]
        _let_train(clone, True, clone.training)

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        road = self.__dict__["clone"].forward
        if stock:  # is called with more
            forward = road
            road = lambda host, input, sample: forward(input)  # noqa: E731
        return road, road

    def covers(self, key: str) -> bool:
        return key in self._parameters

    def needs_forward(self) -> bool:
        """Not of a copy of buffers alone, unless it is a norm's statistics."""
        return self.role == "norm" or any(True for _ in self.parameters())

    def roles(self) -> dict[str, list[nn.Parameter]]:
        return {self.role: list(self.parameters())}

    def values(self, below: Below) -> dict[str, Tensor]:
        named = {**self._parameters, **self._buffers}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def hand_over(self, plain: nn.Module) -> None:
        self.follow()
        for key, value in self.__dict__["clone"].__dict__.items():
            kept = isinstance(value, (bool, int, float, str, Tensor)) or value is None or _may_be_cache(value)
            if kept and key not in MACHINERY and value is not self.host.__dict__.get(key, _UNSEEN):
                plain.__dict__[key] = copy.copy(value)

    def reads(self, below: Below, key: str, enter: Callable[[str], None], *, fused: bool) -> Any:
        """Who has read all parameters may have done the module's work."""
        enter(key)
        if key in self._parameters:
            return self._parameters[key]
        return self._buffers.get(key, NotImplemented)

    def train(self, mode: bool = True) -> Own:
        super().train(mode)
        self.mode()
        clone = self.__dict__["clone"]
        _let_train(clone, clone.training)
        return self

    def record(self, *, open: bool) -> Record:
        """Parameters and persistent buffers."""
        tensors = {name: tensor.detach() for name, tensor in self.state_dict(keep_vars=True).items()}
        saved({name: tensor for name, tensor in tensors.items() if name not in self._free()})
        facts: dict[str, Any] = {"kind": self.kind, "role": self.role}
        facts |= {} if self.buffers_own else {"buffers": False}
        return Record(facts if self.only is None else {**facts, "only": self.only}, tensors)

    @classmethod
    def read(cls, record: Record, host: nn.Module, given: nn.Module | None = None) -> Own:
        record.only("role", "buffers", "only")
        role, buffers = record.fact("role", str), record.facts.get("buffers", True)
        if type(buffers) is not bool:
            raise record.refuse(f"buffers: expected true or false, got {buffers!r}")
        if role not in _ROLES or (role == "norm" and not is_norm(host)):
            raise record.refuse(f"role: expected {' or '.join(_ROLES)}, as the base's module is, got {role!r}")
        only = None if "only" not in record.facts else record.fact("only", list)
        try:
            part = cls(host, role, buffers=buffers, only=only)
        except (TypeError, ValueError) as error:
            raise record.refuse(str(error)) from None
        own = part.state_dict(keep_vars=True)
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        given_tensors = record.take(expected, free=part._free())
        if role == "norm" and (variance := given_tensors.get("running_var")) is not None and bool((variance < 0).any()):
            raise record.refuse_tensor("running_var", f"expected variances, got {variance.min().item():.6g}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given_tensors[name])
        return part

    def _free(self) -> set[str]:
        """The tensors that may hold Inf: buffers of what is no norm, such as attention masks."""
        return set() if self.role == "norm" else set(self._buffers)

    @classmethod
    def typed_as_base(cls, record: Record) -> list[Tensor]:
        return list(record.likes().values())

    def differs(self, other: Part) -> str | None:
        if not isinstance(other, Own):
            return super().differs(other)
        if self.role != other.role:
            return f"role: expected {other.role!r}, got {self.role!r}"
        if self.only != other.only:
            return f"only: expected {other.only}, got {self.only}"
        return None if self.buffers_own == other.buffers_own else f"buffers: expected {other.buffers_own}"

    def lost(self) -> list[str]:
        for key, buffer in self._buffers.items():
            lasting = key not in self._non_persistent_buffers_set
            if lasting and buffer is not None and self.host._buffers.get(key) is None:
                raise TapsError(
                    f"its buffer {key} was None when the task was added, so that a fresh base has no place for it; run "
                    "the base once before it is adapted"
                )
        cls = original_class(self.host)
        lost = ["extra state"] if cls.get_extra_state is not nn.Module.get_extra_state else []
        for key in self._non_persistent_buffers_set:
            own, base = self._buffers.get(key), self.host._buffers.get(key)
            if own is not None and base is not None and own.shape == base.shape and not torch.equal(own, base):
                lost.append(f"a buffer {key} that is not persistent and has changed")
        return lost
