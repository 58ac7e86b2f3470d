"""The line on a terminal: bar, count and remaining time whatever there is to note."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
import torch
from models import TinyNet, settle
from rich.console import Console
from test_trainer import data

from taps_ext import TapsConfig, TaskModel
from taps_ext.train import Task, TrainConfig, Trainer, bar

WHOLE = re.compile(r"^(?P<title>\S.*?) +━+[╸╺]?━* +(?P<count>\d+/\d+) +(\d:\d\d:\d\d|-:--:--)(?P<note>.*)$")


def shown(progress: Any, width: int = 80) -> list[str]:
    """The lines of a terminal of this width."""
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(progress.get_renderable())
    return console.export_text().splitlines()


@pytest.mark.parametrize("title", ["t", "birds", "a task with a name of some forty letters"])
@pytest.mark.parametrize("total", [1, 5000, 123456])
@pytest.mark.parametrize(
    "note", ["", "epoch 3  loss 0.12", "epoch 3  " + "a_task_val_accuracy 0.9312  " * 40, "x" * 500]
)
def test_the_note_is_cut_first(title, total, note) -> None:
    progress = bar.progress_line(Console(width=80, file=io.StringIO(), force_terminal=True))
    progress.add_task(title, total=total, completed=total // 2, note=note)
    (line,) = shown(progress)
    found = WHOLE.match(line)
    assert found and len(line) <= 80, line
    assert found["count"] == f"{total // 2}/{total}"
    assert sum(line.count(part) for part in "━╸╺") >= 19  # of 20, of which one may be between two halves
    assert found["title"] == (title if len(title) <= 20 else title[:19] + "…")
    said = found["note"].strip()
    assert said == note or (said.endswith("…") and note.startswith(said[:-1]) and len(said) >= 8)


def test_a_wide_terminal_has_room_for_more() -> None:
    progress = bar.progress_line(Console(width=200, file=io.StringIO(), force_terminal=True))
    note = "epoch 3  loss 0.1234  val_accuracy 0.98  share 0.3  layers_open 3  reopened 4"
    progress.add_task("birds", total=100, note=note)
    (line,) = shown(progress, 200)
    assert note in line


@pytest.mark.parametrize("mode", ["incremental", "joint"])
def test_runs_on_a_terminal(mode, monkeypatch, capsys) -> None:
    """One with a long name, and one of twelve tasks, each of which has metrics to tell."""
    lines, made = [], bar.progress_line

    def kept(console: Console) -> Any:
        lines.append(made(Console(width=80, file=io.StringIO(), force_terminal=True)))
        return lines[-1]

    monkeypatch.setattr(bar, "progress_line", kept)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    torch.manual_seed(0)
    model, tasks = TaskModel(settle(TinyNet()), TapsConfig(lam=0.5)), {}
    for index in range(12 if mode == "joint" else 1):
        name = f"a task with quite a long name, {index}"
        model.add_task(name, num_classes=4)
        tasks[name] = Task(train=data(32), val=data(16, 2))
    Trainer(model, tasks, TrainConfig(epochs=2, warmup_epochs=0)).fit(mode)
    (line,) = shown(lines[0])
    found = WHOLE.match(line)
    assert found and len(line) <= 80 and found["count"] == "2/2", line
    assert found["note"].strip().startswith("epoch 1") and line.rstrip().endswith("…")
