"""Several tasks on the same samples: those whose parts can be served together share one pass of the base."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from ..errors import ConfigError, UnsupportedModuleError, suggestion
from ..parts import Part
from ..parts.sampling import batch_size
from ..routing.frame import Frame, settings
from .running import check_guard, check_seen, run_frame, watched

if TYPE_CHECKING:
    from .task_model import TaskModel


def check_tasks(tasks: Any, known: Mapping[str, Any]) -> list[str]:
    """Raise ConfigError for anything else than names of known tasks, each once."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise ConfigError(f"tasks: expected a list of names of tasks, got {tasks!r}")
    for place, name in enumerate(tasks):
        if not isinstance(name, str) or name not in known:
            raise ConfigError(
                f"tasks[{place}]: expected one of {list(known)}, got {name!r}{suggestion(str(name), known)}"
            )
    if twice := [name for name in tasks if list(tasks).count(name) > 1]:
        raise ConfigError(f"tasks: expected each task once, got {twice[0]!r} again")
    return list(tasks)


def run_tasks(model: TaskModel, tasks: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """What each task makes of the same samples. Raises as :meth:`TaskModel.forward_tasks`."""
    names = check_tasks(tasks, model._names)
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(_what_joins(model, name), []).append(name)
    found: dict[str, Any] = {}
    for key, group in groups.items():
        if len(group) > 1 and key is not None:
            found |= _together(model, group, args, kwargs)
        else:
            found |= {name: model._forward(None, name, None, args, kwargs) for name in group}
    return {name: found[name] for name in names}


def share_a_pass(model: TaskModel, names: Sequence[str]) -> bool:
    """Whether :func:`run_tasks` serves these tasks by one pass of the base."""
    keys = {_what_joins(model, name) for name in names}
    return len(names) > 1 and len(keys) == 1 and None not in keys


@torch.compiler.disable
def _what_joins(model: TaskModel, name: str) -> Hashable:
    """Equal for tasks that may share a pass; None for one that needs its own."""
    state = model.state(name)
    if model.batch_dim != 0 or reference.may_be_transformed():
        return None
    if state.installed or state.config.samples or state.head is None:
        return None
    joins = tuple((place, part.joins()) for place, part in state.table.items())
    if any(found is None for _, found in joins):
        return None
    return id(state.family), joins


@torch.compiler.disable
def _together(model: TaskModel, names: Sequence[str], args: Any, kwargs: Any) -> dict[str, Any]:
    """One pass of tasks that join."""
    batch = batch_size(args, kwargs, 0)
    if batch is None:
        raise ConfigError("forward_tasks: expected a tensor with samples among the forward's arguments, got none")
    states = [(name, model._begin(name)) for name in names]
    for name, _ in states:
        check_guard(model, name)
    bindings = [state.catch_up() for _, state in states]
    first = states[0][1]
    stacks: dict[str, tuple[Part, ...]] = dict(bindings[0].stacks)
    for place in first.table:
        own = [state.table[place] for _, state in states]
        stacks[place] = (*stacks[place][:-1], type(own[0]).joined(own, batch))
    bound = {place: found for place, found in bindings[0].bound.items() if place not in first.table}
    frame = Frame(stacks, set(), None, bound, settings(stacks))
    assert first.head_path is not None
    heads: Any = stacks[first.head_path][-1]
    try:
        output = watched(model, states, lambda: run_frame(model, None, frame, args, kwargs))
        made = list(heads.made)
    finally:
        heads.made.clear()  # graphs hold the frame
    if len(made) != len(names) or output is not made[0]:
        raise UnsupportedModuleError(
            "forward_tasks: expected a base that calls its head once and returns what that gives, since tasks' heads "
            "give different things; run these tasks one by one: model(x, task=...)"
        )
    for name, state in states:
        check_seen(model, name, state, frame.entered)
    return dict(zip(names, made, strict=True))
