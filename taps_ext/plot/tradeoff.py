"""Accuracy against size: methods as points, and the front that no smaller one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from ..errors import ConfigError
from .canvas import new_figure

MARKERS = "os^Dv"


class Point(NamedTuple):
    """A method: the size of what it adds, what it reaches, the half-width of that (nan: unknown).

    One that has not `converged` is drawn hollow and is on no front.
    """

    method: str
    size: float
    value: float
    half: float = math.nan
    converged: bool = True


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats with a size as small, the smallest first."""
    found: list[Point] = []
    for point in sorted((p for p in points if p.converged), key=lambda p: (p.size, -p.value)):
        if not found or point.value > found[-1].value:
            found.append(point)
    return found


def tradeoff(
    path: str | PathLike[str],
    panels: Mapping[str, Sequence[Point]],
    *,
    x: str = "bytes of a task's file",
    y: str = "test accuracy, %",
    columns: int = 3,
) -> None:
    """Draw a panel for each title, so many side by side: its points over a logarithmic size, and their front as steps.
    A method looks the same in all of them.

    Raises:
        ConfigError: matplotlib is not installed, there is no point to draw, or one has no size above 0.
    """
    drawn = {title: points for title, points in panels.items() if points}
    if not drawn:
        raise ConfigError("panels: expected at least one point to draw, got none")
    for points in drawn.values():
        for point in points:
            if not point.size > 0:
                raise ConfigError(f"panels: expected sizes above 0, got {point.size} of {point.method!r}")
    wide = min(columns, len(drawn))
    high = math.ceil(len(drawn) / wide)
    figure = new_figure(1.0 + 4.8 * wide, 4.2 * high)
    grid = list(figure.subplots(high, wide, squeeze=False).flat)
    methods = list(dict.fromkeys(point.method for points in drawn.values() for point in points))
    styles = {method: (f"C{i % 10}", MARKERS[i // 10 % len(MARKERS)]) for i, method in enumerate(methods)}
    handles: dict[str, Any] = {}
    for axes, (title, points) in zip(grid, drawn.items(), strict=False):
        handles = _panel(axes, points, styles) | handles
        axes.set(title=title, xlabel=x, ylabel=y)
    for axes in grid[len(drawn) :]:
        axes.remove()
    figure.legend([handles[method] for method in methods], methods, loc="outside lower center", ncols=2 + wide)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, points: Sequence[Point], styles: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Method -> its point as the legend shows it."""
    best = front(points)
    axes.set_xscale("log")
    axes.step([p.size for p in best], [p.value for p in best], where="post", color="0.6", lw=1.2, zorder=1)
    handles = {}
    for point in points:
        color, marker = styles[point.method]
        half = None if math.isnan(point.half) else point.half
        fill = color if point.converged else "white"
        axes.errorbar(point.size, point.value, yerr=half, fmt=marker, color=color, mfc=fill, capsize=3, zorder=2)
        (handles[point.method],) = axes.plot([], [], marker, color=color)
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    return handles
