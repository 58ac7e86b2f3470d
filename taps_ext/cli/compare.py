"""`taps compare`: which method for which budget, on the tasks of a configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .common import count, emit, say
from .config import check_input, load_config
from .dense import dense_tasks

PURPOSE = "Train the tasks of a configuration by several methods, and say which does for which budget."
EXAMPLE = "taps compare signs.toml --methods probe,scale-bias,lora:8,taps,full --out runs/compare"
LAST = "overrides"
MORE = """

Each method has the same number of learning rates (--budget-trials, around train.lr) on one seed; the best on
validation data is trained with all seeds. What is in --out already is not trained again. [method] is not looked at."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="base, data, train, tasks.NAME")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings over the file's, as TOML"
    )
    parser.add_argument(
        "--methods",
        metavar="LIST",
        default="probe,scale-bias,lora:8,taps,full",
        help="such as separate:bottom=0.1,lora:8,selective-lora:8:lam=0.1,taps:lam=0.3 (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=count(1), default=3, metavar="N", help="runs a method and task (default: 3)")
    parser.add_argument(
        "--budget-trials",
        "--trials",
        dest="trials",
        type=count(1),
        default=3,
        metavar="N",
        help="learning rates a method (default: 3)",
    )
    parser.add_argument("--max-minutes", type=float, metavar="M", help="begin no run after this time")
    parser.add_argument("--out", metavar="DIR", default="runs/compare", help="default: runs/compare")
    parser.add_argument("--plot", metavar="FILE", help="a picture of accuracy against file bytes, with its front")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if not config.tasks:
        raise ConfigError(f"{args.config}: expected at least one [tasks.NAME] section, got none")
    from ..plot import tradeoff
    from ..plot.canvas import check_picture
    from ..study import compare, parse_methods
    from ..train import Task

    if args.plot is not None:
        check_picture(args.plot)
    methods = parse_methods(args.methods)
    settings, base = config.training(), config.base()
    tasks, heads = {}, {}
    if config.dense:
        for name, made in dense_tasks(config, base).items():
            check_input(base, made.task.train[0][0], config.tasks[name]["source"])
            tasks[name], heads[name] = made
    for name in () if config.dense else config.tasks:
        source = config.source(name)
        check_input(base, source.train[0][0], source.name)
        labels = list(source.classes)
        tasks[name] = Task(
            train=source.train, val=source.val, test=source.test, labels=labels, preprocessing=source.preprocessing
        )
    with Grid() as grid:
        found = compare(
            base,
            tasks,
            methods,
            settings,
            seeds=args.seeds,
            trials=args.trials,
            out=args.out,
            max_minutes=args.max_minutes,
            tell=grid.tell,
            heads=heads,
        )
    if args.plot is not None:
        points = found.points()
        if points:
            tradeoff(args.plot, {f"mean of {len(tasks)} tasks" if len(tasks) > 1 else next(iter(tasks)): points})
        else:
            say("no picture: no method was trained on every task")
    if args.json:
        emit(found.to_dict())
    else:
        print(found.table())
        say(f"all runs and comparison.json are in {Path(args.out)}")
    return 0


class Grid:
    """How far a comparison is: a bar over its runs on a terminal, numbered lines elsewhere."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __enter__(self) -> Grid:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.table import Column

            note = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
            columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), note)
            self.bar = Progress(*columns, console=Console(stderr=True), expand=True)
            self.run = self.bar.add_task("")
            self.bar.start()
        return self

    def tell(self, done: int, total: int, line: str) -> None:
        if self.bar is None:
            say(f"[{done + 1}/{total}] {line}")
        else:
            self.bar.update(self.run, completed=done, total=total, description=line)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
