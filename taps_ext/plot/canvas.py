"""A matplotlib figure that needs no display."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


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
