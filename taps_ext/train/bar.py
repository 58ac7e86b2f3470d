"""The line that tells a person how far a run is."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class NoteColumn(ProgressColumn):
    """What an epoch came to, in what room the others leave it: only this column may be made narrower."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=False))

    def render(self, task: Any) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def progress_line(console: Console) -> Progress:
    """One line of title, bar, count, remaining time and note; a long title or note is cut, and never the others."""
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=20)),
        BarColumn(bar_width=max(10, min(40, console.width // 4)), table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        NoteColumn(),
        console=console,
    )
