"""The compiled extension, or None with a warning where it cannot be loaded."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

C: ModuleType | None
try:
    C = importlib.import_module("taps_ext._C")
except ImportError as error:
    C = None
    warnings.warn(
        f"taps_ext: the compiled extension cannot be loaded ({error}); using the slower pure-torch reference",
        RuntimeWarning,
        stacklevel=2,
    )
