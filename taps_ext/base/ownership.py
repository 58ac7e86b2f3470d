"""What a base model must be before it is adapted, and what tensors must be to take its place."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, UnsupportedModuleError
from ..routing.route import is_routed, unroute
from ..store.errors import show
from .flags import Flags
from .offload import check_present


def check_state(
    wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], *, where: str, what: str, may_lack: str = ""
) -> None:
    """Raise unless `got` holds exactly the tensors of `wanted` by name, shape and dtype.

    Args:
        where: what the message begins with. what: whose tensors `wanted` are.
        may_lack: the end of names that `got` may leave out.

    Raises:
        ConfigError: the first tensor that is missing, too many, or of another shape or dtype.
    """
    missing = [name for name in wanted if name not in got and not (may_lack and name.endswith(may_lack))]
    extra = [name for name in got if name not in wanted]
    if missing or extra:
        problem = f"has no {show(missing[0])}" if missing else f"holds {show(extra[0])}, which the {what} has not"
        counts = f"{len(missing)} missing, {len(extra)} too many of {len(wanted)} tensors"
        raise ConfigError(f"{where}: {problem} ({counts})")
    for name, tensor in got.items():
        like = wanted[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise ConfigError(
                f"{where}: {name}: expected {like.dtype} {list(like.shape)} as in the {what}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )


_owners: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Flags]] = weakref.WeakKeyDictionary()


def check_base(base: nn.Module) -> None:
    """Raise unless `base` is a bare, initialised module that no other TaskModel adapts.

    Raises:
        ConfigError: not a module, a wrapper, adapted already, or a forward with an argument `task` or `tasks`.
        UnsupportedModuleError: a lazy parameter, or one that is offloaded, naming it.
    """
    if not isinstance(base, nn.Module):
        raise ConfigError(f"base: expected an nn.Module, got {type(base).__name__}")
    if hasattr(base, "merge_and_unload") and hasattr(base, "add_task"):
        raise ConfigError("base: expected the bare model, got a TaskModel; add further tasks to that")
    if isinstance(base, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConfigError(f"base: expected the bare model, got {type(base).__name__}")
    if isinstance(base, torch._dynamo.OptimizedModule):
        raise ConfigError("base: expected the bare model, got a compiled one; compile the TaskModel instead")
    for name, module in base.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = name or "base"
            raise UnsupportedModuleError(f"{where}: expected a module of Python code, got a scripted one")
        if getattr(type(module), "taps_drop_in", False):
            raise ConfigError(f"base: {name} is a drop-in layer of its own; call taps_ext.nn.revert(model) first")
    clash = {"task", "tasks"} & set(inspect.signature(base.forward).parameters)
    if clash:
        raise ConfigError(f"base: its forward has an argument {sorted(clash)[0]!r}, which TaskModel needs")
    for name, tensor in (*base.named_parameters(), *base.named_buffers()):
        if is_lazy(tensor):
            raise UnsupportedModuleError(f"{name}: expected initialised parameters; run the base once first")
    check_present(base)
    _take_over(base)


def _take_over(base: nn.Module) -> None:
    """Free a base from a TaskModel that is gone or has no tasks; raise if one with tasks adapts it."""
    owner, flags = _owners.pop(base, (None, None))
    model = None if owner is None else owner()
    if flags is not None and (model is None or not model.tasks):
        if model is not None:
            model.unload()
        for module in base.modules():
            unroute(module)
        flags.restore(base)
    elif any(is_routed(module) for module in base.modules()):
        if owner is not None and flags is not None:
            _owners[base] = owner, flags
        elif not _is_adapted(base):  # a copy of a base that was: nobody is to give it back
            for module in base.modules():
                unroute(module)
            return
        raise ConfigError("base: expected a model of its own, got one that another TaskModel adapts; unload() that")


def _is_adapted(base: nn.Module) -> bool:
    """True if modules of `base` are those of another base with a TaskModel that is still there."""
    mine = {id(module) for module in base.modules() if is_routed(module)}
    alive = [other for other, (owner, _) in list(_owners.items()) if owner() is not None]
    return any(id(module) in mine for other in alive for module in other.modules())


def own(base: nn.Module, model: Any, flags: Flags) -> None:
    """Remember which TaskModel adapts a base, and how the base was before."""
    _owners[base] = weakref.ref(model), flags


def disown(base: nn.Module) -> None:
    """Forget who adapts a base."""
    _owners.pop(base, None)
