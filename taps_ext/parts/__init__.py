"""What a task puts over one module of the base: a `Part`, of which a `Layer` lets a `Change` in through a `Gate`."""

from .adapter import ParallelAdapter, SeriesAdapter
from .change import Change, change_kinds, register_change
from .dense import Dense, Whole
from .gate import Gate
from .instead import Instead
from .layer import Installed, Layer
from .lowrank import LowRank
from .modulator import Axes, LowModulator, Modulator
from .own import Own
from .packed import Bitmask, Int4, Int8, Sign
from .part import Below, Part, part_kinds, register_part
from .rows import Rows
from .singular import Singular
from .streams import DropoutLowRank, StreamLowRank, Streams

__all__ = [
    "Axes",
    "Below",
    "Bitmask",
    "Change",
    "Dense",
    "DropoutLowRank",
    "Gate",
    "Installed",
    "Instead",
    "Int4",
    "Int8",
    "Layer",
    "LowModulator",
    "LowRank",
    "Modulator",
    "Own",
    "ParallelAdapter",
    "Part",
    "Rows",
    "SeriesAdapter",
    "Sign",
    "Singular",
    "StreamLowRank",
    "Streams",
    "Whole",
    "change_kinds",
    "part_kinds",
    "register_change",
    "register_part",
]
