"""Serving many tasks of one base: the engine, and HTTP over it (`http.py`, which needs the extra `serve`)."""

from .core import Answer
from .engine import Engine
from .errors import (
    EngineClosedError,
    InputError,
    QueueFullError,
    TaskReplacedError,
    TaskTooLargeError,
    UnknownTaskError,
)

__all__ = [
    "Answer",
    "Engine",
    "EngineClosedError",
    "InputError",
    "QueueFullError",
    "TaskReplacedError",
    "TaskTooLargeError",
    "UnknownTaskError",
]
