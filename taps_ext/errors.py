"""Exceptions: every refusal names the argument or module, what was expected and what came."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
