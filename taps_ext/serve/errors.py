"""What an engine refuses, beside what the rest of the package does."""

from __future__ import annotations

import copy

from ..errors import ConfigError, TapsError


class UnknownTaskError(ConfigError):
    """The folder has no task of that name."""


class InputError(ConfigError):
    """An input of another shape or type than the task takes, or a body that is none."""


class QueueFullError(TapsError, RuntimeError):
    """As many samples wait as may; try again a little later."""


class EngineClosedError(TapsError, RuntimeError):
    """The engine answers no new requests."""


class TaskTooLargeError(TapsError, MemoryError):
    """A task takes more memory than there may be, beside those that are pinned."""


class TaskReplacedError(TapsError, RuntimeError):
    """The task was replaced after an input had been made as the old one wants it."""


def own(error: BaseException) -> BaseException:
    """The error for one of several who get it: raised in one thread, it gathers no traceback for another."""
    try:
        made = copy.copy(error)
    except Exception:  # of a class that cannot be made anew
        return error
    return made.with_traceback(None)
