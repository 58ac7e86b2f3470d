"""Entry points: what a base has beside `forward`, reached through the TaskModel.

A method of the base that is called on the TaskModel runs the active task as `model(x)` does, in one frame from its
start to its return, however often it calls the base's modules or the base itself. A plain attribute of the base can be
read. Names that nn.Module or TaskModel has are theirs, and names that begin with `_` stay the base's alone.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
from collections.abc import Callable
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..base.guard import Held
from ..errors import BaseAttributeError, ConfigError, TapsError
from ..parts.host import original_class
from .tracing import ActiveTask

ACTIVE: Any = ActiveTask()

_SAVES = "save_task(name, path) writes a task, and merge_and_unload(name) gives a plain model to save"
_ADAPTERS = "tasks are this model's adapters: add_task, load_task, set_task, delete_task"
# Methods of transformers, peft and timm that keep, load or rebuild the model that they are called on, and what does for
# tasks what they do for a model.
REFUSED = {
    "save_pretrained": _SAVES,
    "push_to_hub": _SAVES,
    "save_pretrained_merged": _SAVES,
    "from_pretrained": "load_task(path) loads a task; a base is loaded before it is wrapped",
    "load_pretrained": "load_task(path) loads a task; a base is loaded before it is wrapped",
    **dict.fromkeys(
        (
            "load_adapter",
            "add_adapter",
            "set_adapter",
            "delete_adapter",
            "enable_adapters",
            "disable_adapters",
            "active_adapters",
            "active_adapter",
            "get_adapter_state_dict",
            "enable_peft_hotswap",
        ),
        _ADAPTERS,
    ),
    "reset_classifier": "add_task(name, num_classes=...) gives a task a head of its own",
    "resize_token_embeddings": "change the base before it is wrapped",
    "set_input_embeddings": "change the base before it is wrapped",
    "set_output_embeddings": "add_task(name, head=...) gives a task a head of its own",
    "init_weights": "change the base before it is wrapped",
    "dequantize": "change the base before it is wrapped",
}

_LAZY = (
    collections.abc.Iterator,
    collections.abc.Awaitable,
    collections.abc.AsyncIterator,
)


class EntryPoints(nn.Module):
    """What :class:`TaskModel` answers to for its base."""

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})  # empty while a copy or an unpickled model is being made
        if name in modules:
            return modules[name]
        own = name.startswith("_") or hasattr(type(self), name)
        if own or "base" not in modules or name in self._parameters or name in self._buffers:
            return super().__getattr__(name)
        return _of_base(self, modules["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "task":
            raise AttributeError("task: expected model.set_task(name), or model(x, task=name), got an assignment")
        modules = self.__dict__.get("_modules", {})
        free = name.startswith("_") or name in self.__dict__ or name in modules or hasattr(type(self), name)
        if not free and "base" in modules and hasattr(modules["base"], name):
            raise BaseAttributeError(
                f"{name}: is the base's and can only be read here; set it on model.base, or before it is wrapped"
            )
        super().__setattr__(name, value)

    def _forward(self, entry: str | None, task: Any, tasks: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


def _of_base(model: EntryPoints, base: nn.Module, name: str) -> Any:
    """The base's attribute `name` as the TaskModel has it.

    Raises:
        AttributeError: the base has none. BaseAttributeError: one that the TaskModel has another method for, or that
            knows no task.
    """
    try:
        found = getattr(base, name)
    except AttributeError:
        if hasattr(type(base), name):
            raise  # a property's own
        model_class, base_class = type(model).__name__, type(base).__name__
        raise AttributeError(
            f"{model_class!r} object has no attribute {name!r}, and neither has its base, a {base_class}"
        ) from None
    if name in REFUSED:
        raise BaseAttributeError(
            f"{name}: is for a model as a whole, and this one is a base with tasks; {REFUSED[name]}"
        )
    if isinstance(found, (nn.Module, Tensor)):
        kind = "module" if isinstance(found, nn.Module) else "tensor"
        raise BaseAttributeError(
            f"{name}: is a {kind} of the base, which knows no task outside of this model's forward; model.base.{name} "
            "is the base's own, and model.state(task) holds a task's"
        )
    if isinstance(found, (FunctionType, MethodType, BuiltinMethodType, functools.partial)):
        if isinstance(getattr(found, "__self__", None), type):
            return getattr(original_class(base), name)  # of the class: it runs no model
        return _entry(model, name, found)
    return found


def _arguments(method: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(method).parameters)
    except (TypeError, ValueError):  # of a builtin
        return frozenset()


def _entry(model: EntryPoints, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the base that runs a task."""

    def call(*args: Any, task: Any = ACTIVE, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            raise TapsError(f"torch.export: {name}: export that of merge_and_unload(name) instead")
        known = _arguments(method)
        if "task" in known:
            raise ConfigError(
                f"{name}: the base's method has an argument 'task', which names the task to run here; give the base a "
                f"method that calls it by another one, such as base.my_{name} = lambda x, kind: base.{name}(x, "
                "task=kind), and call that"
            )
        tasks = None if "tasks" in known else kwargs.pop("tasks", None)
        return model._forward(name, task, tasks, args, kwargs)

    return functools.update_wrapper(call, method)


def enter(model: nn.Module, base: nn.Module, entry: str, run: Callable[[], Any]) -> Any:
    """Run a method of the base, and see that it has left the base alone and is done when it returns.

    What a forward must enter does not hold here: a method may well run a part of the model, such as one tower of two.

    Args:
        base: what the method is called on: the base, or its mirror. run: calls it, in a frame.

    Raises:
        TapsError: it changed the names, identities or versions of the base's tensors, naming one; it returned something
            that runs later, where no task does, or a module of the base.
    """
    before = Held(base)
    found = run()
    changed = before.changed(base)
    if changed is not None:
        raise TapsError(
            f"{entry}: the base's method changed the base's {changed}, so that tasks would belong to no base that "
            "exists; load the base anew, and call the method before it is wrapped. A tensor that the method is to "
            'write to can be the task\'s (others="task")'
        )
    if isinstance(found, _LAZY):
        close = getattr(found, "close", None)
        if close is not None:
            close()
        raise TapsError(
            f"{entry}: expected a method that has done its work when it returns, got a {type(found).__name__}, which "
            "would run later, when no task does; give the base a method that goes through it and returns what it gave"
        )
    if found is base:
        return model
    if isinstance(found, nn.Module) and any(found is module for module in base.modules()):
        raise TapsError(
            f"{entry}: returned a module of the base, which knows no task outside of this model's forward; "
            f"model.base.{entry}() is the base's own, and model.state(task) holds a task's"
        )
    return found
