"""The state of an interrupted run, in one verified file: parts, optimizer, random numbers, best epoch so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import store
from ..errors import ConfigError, TaskFileError
from ..model.state import Parts, TaskState
from ..store.errors import MetadataError, ParentMismatchError, UnexpectedTensorError
from . import randomness
from .stepper import Stepper, moments, put_moments

GROUPS = ("part", "optimizer", "best", "average", "random", "own", "weighting")
"""What a state's tensors belong to: each is called `<group>:<name>`."""


def snapshot(state: Parts) -> dict[str, Tensor]:
    """Copies of everything the task or family holds: parameters and buffers, by name."""
    return {name: tensor.detach().clone() for name, tensor in state.state_dict().items()}


def restore(state: Parts, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot back in place."""
    state.load_state_dict(tensors)
    if isinstance(state, TaskState):
        state.refresh(force=True)


def save_run(
    path: Path,
    parts: Mapping[str, Tensor],
    stepper: Stepper,
    kept: Mapping[str, Mapping[str, Tensor]],
    counters: Mapping[str, Any],
    parent: str,
    name: str,
) -> None:
    """Write the whole state of a run of the task `name` ("" for a joint run), atomically: a file of the kind "state".

    `parts` are the tensors that are trained, `kept` further ones: "best" (those of the best epoch), "average" and
    "weighting" (of tasks' losses).
    `counters` is JSON-ready.
    """
    tensors, numbers = moments(stepper.optimizer)
    more, own = stepper.saved()
    groups: dict[str, Mapping[str, Tensor]] = {
        "part": parts,
        "optimizer": tensors,
        **kept,
        "own": own,
        "random": randomness.state(),
    }
    values = {f"{group}:{name}": tensor.cpu() for group, named in groups.items() for name, tensor in named.items()}
    record = store.TaskFile(
        kind="state",
        parent=parent,
        name=name,
        values=values,
        extra={"train.counters": json.dumps({**counters, **more}), "train.numbers": json.dumps(numbers)},
    )
    store.save(path, record)


def _short(value: Any, most: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def same_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError naming the first setting in which an earlier run differs."""
    if not isinstance(before, Mapping):
        raise ConfigError(f"resume: {path}: expected the settings of a run, got {str(before)[:60]!r}")
    for key in [*now, *before]:
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"resume: {path} was started with {key} = {_short(before.get(key))}, got {_short(now.get(key))}; "
                "use the same settings, another out, or resume=False (--restart) to start over"
            )


def _table(record: store.TaskFile, key: str, path: Path) -> dict[str, Any]:
    """A JSON object outside of the format's own entries; raises MetadataError where a state lacks it."""
    try:
        found = json.loads(record.extra.get(key, "null"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise MetadataError(path, f"{key}: expected a JSON object, got {record.extra.get(key, 'none')[:60]}")
    return found


@contextmanager
def advising(path: Path) -> Iterator[None]:
    """What cannot be read of a finished run says how to go on."""
    advice = "delete it, or use resume=False (--restart)"
    try:
        yield
    except TaskFileError as error:
        raise type(error)(error.path, f"{error.problem}; {advice}") from error
    except OSError as error:
        raise ConfigError(f"resume: {path} cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"resume: {path} is damaged ({error}); {advice}") from None


def load_run(
    path: Path,
    put: Callable[[Mapping[str, Tensor]], None],
    stepper: Stepper,
    parent: str,
    expected: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Put a saved run back, 0.1's among them; returns (what was `kept` beside it, counters).

    Args:
        put: takes the tensors that are trained.
        expected: the settings of the run that is to go on.

    Raises:
        TaskFileError: a damaged file, no state of a run (KindError), or another base.
        ConfigError: `expected` (the settings) differ from those the run was started with, naming the first.
    """
    try:
        record = store.load(path, kind="state")
    except TaskFileError as error:
        hint = "another out, or resume=False (--restart), starts over"
        raise type(error)(error.path, f"{error.problem}; {hint}") from error
    if record.parent != parent:
        raise ParentMismatchError(
            path, "was started on another base; give that one, another out, or resume=False (--restart) to start over"
        )
    counters, numbers = (_table(record, key, path) for key in ("train.counters", "train.numbers"))
    same_settings(path, counters.get("settings", {}), expected)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in GROUPS}
    for name, tensor in record.values.items():
        group, _, rest = name.partition(":")
        if group not in groups:
            raise UnexpectedTensorError(path, f"tensor {name!r}: expected one of {', '.join(GROUPS)} before a colon")
        groups[group][rest] = tensor
    put(groups["part"])
    put_moments(stepper.optimizer, groups["optimizer"], numbers)
    stepper.load(counters, groups["own"])
    randomness.restore(groups["random"])
    return {key: groups[key] for key in ("best", "average", "weighting")}, counters
