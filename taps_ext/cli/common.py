"""What the commands share: argument types, tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import ConfigError, TapsError

KINDS = {"task": "task", "shared": "weights that tasks share", "state": "state of a training run"}
"""The kinds of files, in words."""


def count(low: int) -> Callable[[str], int]:
    """An argument type: an int >= `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an int >= {low}, got {text!r}")
        return value

    return parse


def emit(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(message: str) -> None:
    """Progress, for the person watching."""
    print(message, file=sys.stderr, flush=True)


def check_out(out: str, *inputs: Any) -> None:
    """Raise ConfigError if what is to be written is one of the files that are read, shards of a checkpoint among them
    (None and other values are none)."""
    from ..store.shards import files_of, is_sharded

    read = [given for given in inputs if isinstance(given, (str, Path))]
    for path in filter(is_sharded, list(read)):
        with suppress(TapsError):  # whoever reads it says what is wrong
            read += files_of(path).paths
    for given in read:
        there = Path(out).exists() and Path(given).exists()
        if there and Path(out).samefile(given):
            raise ConfigError(f"out: expected a file of its own, got {out}, which is read")


def size(count: int) -> str:
    """Bytes for people: 512 B, 3.4 kB, 1.2 MB, 1.06 GB (powers of 1000)."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def nbytes(text: str) -> int:
    """An argument type: bytes >= 1, as :func:`size` writes them (2GB, 1.5 MB, 512)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[kMG]?B)\s*", text)
    value = 0 if found is None else round(float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}.get(found[2][:1], 1))
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected bytes such as 512, 200MB or 1.5GB, got {text!r}")
    return value


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
