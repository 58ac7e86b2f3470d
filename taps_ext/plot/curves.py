"""Learning curves and gates over time, from the `metrics.jsonl` that the Trainer writes."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ConfigError, suggestion
from .canvas import new_figure


def read_epochs(metrics: str | PathLike[str]) -> dict[str, list[dict[str, Any]]]:
    """Task -> the epochs of its last run in order, with those of the runs that it went on from.

    Raises:
        ConfigError: a file without epochs, or a line in it that is no JSON object.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    lines = Path(metrics).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["event"] == "start":
                known = found.get(entry["task"], {})
                found[entry["task"]] = {epoch: kept for epoch, kept in known.items() if epoch < entry["epoch"]}
            if entry["event"] == "epoch":
                found.setdefault(entry["task"], {})[entry["epoch"]] = entry
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break  # a run that was killed, or is writing
            raise ConfigError(
                f"metrics: {metrics}: expected a JSON event in line {number}, got {line[:60]!r}"
            ) from None
    found = {task: epochs for task, epochs in found.items() if epochs}
    if not found:
        raise ConfigError(f"metrics: expected epochs in {metrics}, got none")
    return {task: [epochs[i] for i in sorted(epochs)] for task, epochs in found.items()}


def _metric(entry: dict[str, Any]) -> str:
    """The key of a task's first validation metric."""
    return next((key for key in entry if key.startswith("val_") and key != "val_loss"), "val_loss")


def curves(path: str | PathLike[str], metrics: str | PathLike[str]) -> None:
    """Training loss, first validation metric and share of weights open by epoch, a line for each task, into a PNG.

    Args:
        metrics: the `metrics.jsonl` of a run.

    Raises:
        ConfigError: matplotlib is not installed; no epochs in the file.
    """
    runs = read_epochs(metrics)
    figure = new_figure(11.0, 3.4)
    metric = {task: _metric(epochs[0]) for task, epochs in runs.items()}
    names = ", ".join(sorted({chosen[4:] for chosen in metric.values()}))
    panels = (("loss", "training loss"), (None, f"validation {names}"), ("share", "gated weights open"))
    for axes, (panel, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for task, epochs in runs.items():
            key = metric[task] if panel is None else panel
            shown = [entry for entry in epochs if entry.get(key) is not None]
            axes.plot([e["epoch"] for e in shown], [e[key] for e in shown], marker=".", label=task)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if panel == "share":
            axes.set_ylim(-0.03, 1.03)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def gates(path: str | PathLike[str], metrics: str | PathLike[str], task: str | None = None) -> None:
    """The learned scores of one task by layer (rows, the input at the top) and epoch (columns), into a PNG.

    Cells of open layers are coloured; closed ones are grey.

    Args:
        task: whose scores; may be left out where the file holds one task.

    Raises:
        ConfigError: matplotlib is not installed; an unknown task, or one without learned gates.
    """
    runs = read_epochs(metrics)
    if task is None and len(runs) == 1:
        task = next(iter(runs))
    if task not in runs:
        raise ConfigError(f"task: expected one of {list(runs)}, got {task!r}{suggestion(str(task), runs)}")
    epochs = runs[task]
    layers = [layer for layer, score in epochs[-1].get("scores", {}).items() if score is not None]
    if not layers:
        raise ConfigError(f"task: {task!r} has no learned gates to draw")
    if any("open" not in entry for entry in epochs):
        raise ConfigError(f"metrics: {metrics}: expected the open layers of every epoch; an earlier version wrote it")
    table = [[entry["scores"].get(layer) for entry in epochs] for layer in layers]
    figure = new_figure(3.2 + 0.16 * len(epochs), 1.3 + 0.19 * len(layers))
    axes = figure.add_subplot()
    opened = [set(entry["open"]) for entry in epochs]
    shown = [
        [score if score is not None and layer in now else float("nan") for score, now in zip(row, opened, strict=True)]
        for layer, row in zip(layers, table, strict=True)
    ]
    lowest = min((score for row in shown for score in row if score == score), default=0.0)
    axes.set_facecolor("#ededed")
    image = axes.imshow(shown, cmap="YlGnBu", vmin=lowest, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), layers, fontsize=6)
    step = max(1, len(epochs) // 10)
    axes.set_xticks(range(0, len(epochs), step), [epochs[i]["epoch"] for i in range(0, len(epochs), step)])
    axes.set(xlabel="epoch", title=f"{task}: scores of open layers (grey: closed)")
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(path, dpi=130)
