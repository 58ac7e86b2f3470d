"""What accuracy costs: points of several methods over the parameters that each adds for a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

from ..errors import ConfigError
from .canvas import new_figure


def tradeoff(
    path: str | PathLike[str],
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str = "parameters of the task, % of the base",
    y: str = "test accuracy, %",
    title: str = "Accuracy against parameters",
) -> None:
    """Draw method -> its (size, accuracy) points, joined in order of size, into a PNG.

    Raises:
        ConfigError: matplotlib is not installed, or there is no point to draw.
    """
    if not any(points.values()):
        raise ConfigError("points: expected at least one point to draw, got none")
    figure = new_figure(6.0, 4.2)
    axes = figure.add_subplot()
    for method, found in points.items():
        ordered = sorted(found)
        axes.plot([size for size, _ in ordered], [accuracy for _, accuracy in ordered], marker="o", label=method)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
