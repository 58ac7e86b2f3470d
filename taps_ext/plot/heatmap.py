"""The heat map of a set of tasks: which layers each of them opened, and how far it moved them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

from ..errors import ConfigError
from .canvas import new_figure


def heatmap(
    path: str | PathLike[str],
    layers: Sequence[str],
    changes: Mapping[str, Sequence[float | None]],
    *,
    notes: Mapping[str, str] | None = None,
    sizes: Sequence[int] | None = None,
    title: str = "Layers that each task opened",
) -> None:
    """Draw layers (rows, the input at the top) against tasks (columns) into a PNG.

    Args:
        changes: task -> ||Delta|| / ||W|| for each layer, None where the gate is closed.
        notes: task -> a line under its name, such as its accuracy.
        sizes: weights of each layer, shown beside its name.

    Raises:
        ConfigError: matplotlib is not installed, there is nothing to draw, or a task has another number of layers.
    """
    if not layers or not changes:
        raise ConfigError(f"heatmap: expected layers and tasks, got {len(layers)} layers and {len(changes)} tasks")
    for task, values in changes.items():
        if len(values) != len(layers):
            raise ConfigError(f"changes[{task!r}]: expected {len(layers)} layers, got {len(values)}")
    tasks = list(changes)
    peak = max((v for values in changes.values() for v in values if v is not None), default=1.0) or 1.0
    table = [[changes[task][row] or 0.0 for task in tasks] for row in range(len(layers))]

    figure = new_figure(3.4 + 1.15 * len(tasks), 1.9 + 0.34 * len(layers))
    from matplotlib.patches import Patch, Rectangle

    axes = figure.add_subplot()
    image = axes.imshow(table, cmap="YlGnBu", vmin=0.0, vmax=peak, aspect="auto")
    for column, task in enumerate(tasks):
        for row, value in enumerate(changes[task]):
            if value is None:
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, facecolor="#ededed", edgecolor="none"))
            else:
                shade = "white" if value > 0.6 * peak else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
    names = [task if notes is None else f"{task}\n{notes.get(task, '')}" for task in tasks]
    axes.set_xticks(range(len(tasks)), names, fontsize=9)
    axes.xaxis.tick_top()
    labels = list(layers)
    if sizes is not None:
        labels = [f"{layer}  ({count / 1000:.1f} k)" for layer, count in zip(layers, sizes, strict=True)]
        axes.set_ylabel("layer  (weights)", fontsize=9)
    axes.set_yticks(range(len(layers)), labels, fontsize=8)
    axes.set_xticks([x - 0.5 for x in range(1, len(tasks))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, label="open: size of the change  ||Δ|| / ||W||")
    axes.legend(
        handles=[Patch(facecolor="#ededed", label="closed: the base's own weights, nothing stored")],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=144)
