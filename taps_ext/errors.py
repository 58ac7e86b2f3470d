"""The package's exceptions: one tree, so that `except TapsError` catches whatever the package refuses.

Every refusal names the argument or module, what was expected and what came. The branches are here; a room that has more
to tell apart keeps the twigs of its branch (`store.errors` those of `TaskFileError`). Ctrl-C is outside of the tree
(`train.TrainingInterrupted` is a KeyboardInterrupt), and so is what torch's own functions would raise for the same
mistake: the operators raise ValueError, TypeError and RuntimeError as `F.linear` does.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any


class TapsError(Exception):
    """Base class of the package's own exceptions."""


class ConfigError(TapsError, ValueError):
    """A configuration or argument value is not one that is accepted."""


class UnsupportedModuleError(TapsError, NotImplementedError):
    """A module of the base model cannot be adapted as asked."""


class BypassedLayerError(TapsError, RuntimeError):
    """A gated layer's weight was never read through its own forward."""


class GateError(TapsError, RuntimeError):
    """A score or a closed delta holds a value that no gate can be read from."""


class DivergedError(TapsError, ArithmeticError):
    """Training stopped at losses or gradients that are not finite."""


class SourceError(TapsError, ValueError):
    """A spec, a file or an array that cannot become a data source; the message is one line."""


_LONGEST = 400  # characters of a path in a message


class TaskFileError(TapsError, ValueError):
    """A task file, or what should become one, is refused.

    The message is `<path>: <problem>`: `path` is the file (or the operation), `problem` names the tensor or key, what
    was expected and what came. `store.errors` has a subclass for every way in which a file is refused.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        self.path = os.fspath(path)
        self.problem = problem
        shown = self.path if len(self.path) <= _LONGEST else f"{self.path[:_LONGEST]}..."
        super().__init__(f"{shown}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
