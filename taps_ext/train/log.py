"""Progress for people and metrics for programs: a bar on a terminal, lines elsewhere, JSONL on disk."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from .board import Board


def cut_torn_line(path: Path) -> None:
    """Drop what follows the last line break of a file, if there is one."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class Log:
    """Write one JSON line for each event to `path`, and tell a person how far the run is.

    Args:
        path: the `.jsonl` file, appended to; None writes none. What a killed run left of its last line is cut off.
        total: optimizer steps of the run. quiet: say nothing on the terminal.
        first_epoch: where the run starts or goes on; epochs from there on that an earlier run wrote are void.
        board: a folder for TensorBoard, or None.
    """

    def __init__(
        self,
        path: Path | None,
        title: str,
        total: int,
        *,
        first_epoch: int = 0,
        quiet: bool = False,
        board: Path | None = None,
    ) -> None:
        self.board = None if board is None else Board(board, first_epoch)
        if path is not None:
            cut_torn_line(path)
        self.file: TextIO | None = None if path is None else path.open("a", encoding="utf-8")
        self.title, self.quiet = title, quiet
        self.progress: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console

            from .bar import progress_line

            self.progress = progress_line(Console(stderr=True))
            self.progress.start()
            self.bar = self.progress.add_task(title, total=total, note="")
        self.started = time.perf_counter()
        self.event("start", {}, epoch=first_epoch)

    def step(self, done: int) -> None:
        """Move the bar to `done` optimizer steps."""
        if self.progress is not None:
            self.progress.update(self.bar, completed=done)

    def event(self, kind: str, detail: dict[str, Any], **values: Any) -> None:
        """Record an event with its `detail`; the values of an "epoch" are also told to the person watching."""
        if self.file is not None:
            line = {
                "event": kind,
                "task": self.title,
                "seconds": round(time.perf_counter() - self.started, 3),
                **values,
                **detail,
            }
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if kind == "epoch" and self.board is not None:
            self.board.epoch(values, detail.get("scores", {}))
        if kind != "epoch" or self.quiet:
            return
        note = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        if self.progress is not None:
            self.progress.update(self.bar, note=note)
        else:
            print(f"{self.title}: {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.board is not None:
            self.board.close()
        if self.file is not None:
            self.file.close()
