"""A matplotlib figure that needs no display."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ConfigError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # that matplotlib writes


def check_picture(path: str | PathLike[str]) -> None:
    """Raise ConfigError unless a picture can be written there, before there is work to lose."""
    if not isinstance(path, (str, PathLike)):
        raise ConfigError(f"plot: expected a file's path, got {type(path).__name__}")
    if Path(path).suffix.lower() not in PICTURES:
        raise ConfigError(f"plot: expected a name that ends in {', '.join(PICTURES)}, got {path}")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"plot: expected a folder that exists, got {path}")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches. Raises ConfigError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot: matplotlib is not installed: pip install taps_ext[plot]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
