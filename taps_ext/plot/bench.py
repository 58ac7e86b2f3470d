"""Gated layers and their alternatives, as times over the stock op."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from .canvas import new_figure

if TYPE_CHECKING:
    from ..bench import Result


def bench_picture(path: str | PathLike[str], results: Sequence[Result]) -> None:
    """Draw results into a PNG, a row for each. Raises ConfigError where matplotlib is not installed."""
    figure = new_figure(9.0, 1.2 + 0.17 * len(results))
    axes = figure.subplots()
    axes.axvline(1.0, color="black", linewidth=0.8)
    others = list(dict.fromkeys(v for r in results for v in r.seconds if v not in ("taps", "stock")))
    for index, name in enumerate(others):
        rows = [(r.seconds[name] / r.seconds["stock"], -place) for place, r in enumerate(results) if name in r.seconds]
        axes.scatter(
            *zip(*rows, strict=True), s=16, marker="ox^vsd"[index % 6], color="grey", label=name, linewidth=0.8
        )
    axes.scatter(
        [r.ratio for r in results], [-place for place in range(len(results))], s=20, color="tab:orange", label="taps"
    )
    axes.set_yticks([-place for place in range(len(results))], [r.name for r in results], fontsize=6)
    axes.set(xscale="log", xlabel="time over the stock op on whole weights", ylim=(-len(results), 1))
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    axes.minorticks_off()
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=7, loc="upper right")
    figure.savefig(path, dpi=130)
