"""`taps diff`: which parts of two task files differ, and by how much."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from .common import emit, table

PURPOSE = "Show which parts of two task files differ, and by how much, packed or not. Needs no base."
EXAMPLE = "taps diff runs/signs/signs.taps signs.int8.taps"
MORE = """

The difference of a part is |A - B| / |A| over what both files hold there. Scores are left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="a task file (.taps)")
    parser.add_argument("second", metavar="B", help="another")


def run(args: argparse.Namespace) -> int:
    from .. import store
    from ..files.pack import diff_files

    found = diff_files(args.first, args.second)
    one, other = (store.read_header(path).metadata for path in (args.first, args.second))
    same_parent = one.parent == other.parent
    if args.json:
        emit(
            {
                "first": args.first,
                "second": args.second,
                "same_parent": same_parent,
                "methods": [one.method, other.method],
                "parts": [asdict(part) for part in found],
            }
        )
        return 0
    if not same_parent:
        print(f"parents differ: {one.parent} and {other.parent}")
    changed = [part for part in found if part.what != "same"]
    rows = [
        (part.part, part.kinds[0] or "-", part.kinds[1] or "-", part.what, _shown(part.distance)) for part in changed
    ]
    if rows:
        print(table(("part", "A", "B", "", "difference"), rows))
    print(f"{len(changed)} of {len(found)} parts differ")
    return 0


def _shown(distance: float | None) -> str:
    return "-" if distance is None else f"{distance:.2e}"
