"""`taps folder`: many tasks' files in one folder, by name."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .common import emit, size, table

if TYPE_CHECKING:
    from ..files.folder import TaskFolder

PURPOSE = "Keep task files in a folder, each under its task's name."
EXAMPLE = "taps folder add tasks runs/birds/birds.taps"
MORE = """
  taps folder list tasks
  taps folder verify tasks

Files are copied, proven, and appear whole; a name that is taken is refused without --replace."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, purpose: str) -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=purpose, description=purpose)
        one.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document on stdout"
        )
        one.add_argument("folder", metavar="DIR")
        return one

    add = action("add", "Copy task files into the folder, which is made where there is none.")
    add.add_argument("files", metavar="FILE", nargs="+", help="of tasks, and of what they share")
    add.add_argument("--name", metavar="NAME", help="what the folder calls the one task (default: as its file does)")
    add.add_argument("--replace", action="store_true", help="replace tasks of the same name")
    action("list", "Show the tasks; exit code 0 only if all of their files can be read, else 1.")
    remove = action("remove", "Delete tasks' files.")
    remove.add_argument("names", metavar="NAME", nargs="+")
    action("verify", "Check every digest of every file; exit code 0 only if all are sound, else 1.")


def run(args: argparse.Namespace) -> int:
    from ..errors import ConfigError
    from ..files.folder import NameTakenError, TaskFolder

    if args.action != "add" and not os.path.isdir(args.folder):
        there = os.path.lexists(args.folder)
        got = (
            f"{args.folder}, which is none" if there else f"{args.folder}, which is not there; taps folder add makes it"
        )
        raise ConfigError(f"DIR: expected a folder, got {got}")
    folder = TaskFolder(args.folder, create=args.action == "add")
    if args.action == "add":
        if args.name is not None and len(args.files) != 1:
            raise ConfigError(f"name: expected one file with --name, got {len(args.files)}")
        try:
            names = [folder.add(file, args.name, replace=args.replace) for file in args.files]
        except NameTakenError as error:
            raise NameTakenError(error.problem, "--replace replaces it") from None
        return _say(args, [{"file": f, "task": n} for f, n in zip(args.files, names, strict=True)], "file", "task")
    if args.action == "remove":
        for name in args.names:
            folder.file(name)  # all are there before one goes
        for name in args.names:
            folder.remove(name)
        return _say(args, [{"removed": name} for name in args.names], "removed")
    if args.action == "list":
        return _list(args, folder)
    found = folder.verify()
    if args.json:
        emit(found)
    else:
        for file, problem in found.items():
            print(f"ok   {file}" if problem is None else f"BAD  {file}: {problem}")
    return 0 if not any(found.values()) else 1


def _list(args: argparse.Namespace, folder: TaskFolder) -> int:
    """A row for each sound task; a damaged file hides no other."""
    from ..errors import TaskFileError

    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for name in folder:
        try:
            rows.append(folder.summary(name))
        except TaskFileError as error:
            bad.append({"task": name, "problem": error.problem})
    shown = [{**row, "bytes": row["bytes"] if args.json else size(row["bytes"])} for row in rows]
    if args.json:
        emit([*shown, *bad])
    else:
        _say(args, shown, "task", "method", "bytes", "labels")
        for row in bad:
            print(f"BAD  {row['task']}: {row['problem']}")
    return 1 if bad else 0


def _say(args: argparse.Namespace, rows: list[dict[str, Any]], *columns: str) -> int:
    if args.json:
        emit(rows)
    else:
        print(table(columns, [tuple("" if row[c] is None else str(row[c]) for c in columns) for row in rows]))
    return 0
