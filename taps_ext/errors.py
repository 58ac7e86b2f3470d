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


class BaseAttributeError(TapsError, AttributeError):
    """An attribute of the base that its TaskModel does not pass on, or that cannot be set through it."""


class BypassedLayerError(TapsError, RuntimeError):
    """A gated layer's weight was never read through its own forward."""


class GateError(TapsError, RuntimeError):
    """A score or a closed delta holds a value that no gate can be read from."""


class DivergedError(TapsError, ArithmeticError):
    """Training stopped at losses or gradients that are not finite."""


class SourceError(TapsError, ValueError):
    """A spec, a file or an array that cannot become a data source; the message is one line."""


_LONGEST, _LONGEST_PROBLEM = 400, 600  # characters of a path and of a problem in a message


class TaskFileError(TapsError, ValueError):
    """A task file, or what should become one, is refused.

    The message is `<path>: <problem>`: `path` is the file (or the operation), `problem` names the tensor or key, what
    was expected and what came. Both are bounded and in printable characters there, whatever a file holds or is called;
    the attribute `path` is the path as it was given. `store.errors` has a subclass for every way in which a file is
    refused.
    """

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        self.path = os.fspath(path)
        self.problem = _printable(problem, _LONGEST_PROBLEM)
        super().__init__(f"{_printable(os.fsdecode(path), _LONGEST)}: {self.problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem)


def _printable(text: str, most: int) -> str:
    """The text, cut where it is longer than `most` characters, with escapes for what is no printable character."""
    cut = text if len(text) <= most else f"{text[:most]}..."
    if cut.isprintable():
        return cut
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return escaped if len(escaped) <= most else f"{escaped[:most]}..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
