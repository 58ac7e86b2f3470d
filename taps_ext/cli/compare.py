"""`taps compare`: which method for which budget, on the tasks of a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from .common import count, emit, say
from .config import check_input, load_config

PURPOSE = "Train the tasks of a configuration by several methods, and say which does for which budget."
EXAMPLE = "taps compare signs.toml --methods probe,scale-bias,lora:8,taps,full --out runs/compare"
LAST = "overrides"
MORE = """

Each method has the same number of learning rates (--trials, around train.lr) on one seed; the best on validation data
is trained with all seeds. What is in --out already is not trained again. [method] is not looked at."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="base, data, train, tasks.NAME")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings over the file's, as TOML"
    )
    parser.add_argument(
        "--methods",
        metavar="LIST",
        default="probe,scale-bias,lora:8,taps,full",
        help="such as separate:bottom=0.1,lora:8,selective-lora:8,taps:lam=0.3 (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=count(1), default=3, metavar="N", help="runs a method and task (default: 3)")
    parser.add_argument("--trials", type=count(1), default=3, metavar="N", help="learning rates a method (default: 3)")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="begin no run after this time")
    parser.add_argument("--out", metavar="DIR", default="runs/compare", help="default: runs/compare")
    parser.add_argument("--plot", metavar="FILE", help="a picture of accuracy against stored parameters")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if not config.tasks:
        raise ConfigError(f"{args.config}: expected at least one [tasks.NAME] section, got none")
    from ..plot.canvas import check_picture
    from ..study import compare, parse_methods
    from ..train import Task

    if args.plot is not None:
        check_picture(args.plot)
    methods = parse_methods(args.methods)
    settings, base = config.training(), config.base()
    tasks = {}
    for name in config.tasks:
        source = config.source(name)
        check_input(base, source.train[0][0], source.name)
        labels = list(source.classes)
        tasks[name] = Task(
            train=source.train, val=source.val, test=source.test, labels=labels, preprocessing=source.preprocessing
        )
    found = compare(
        base,
        tasks,
        methods,
        settings,
        seeds=args.seeds,
        trials=args.trials,
        out=args.out,
        max_minutes=args.max_minutes,
        tell=say,
    )
    if args.plot is not None:
        from ..plot import tradeoff

        whole = sum(parameter.numel() for parameter in base.parameters())
        points = {
            method: [(100 * row.parameters / whole, 100 * row.test) for row in found.rows if row.method == method]
            for method in methods
        }
        tradeoff(args.plot, {method: found_ for method, found_ in points.items() if found_})
    if args.json:
        emit(found.to_dict())
    else:
        print(found.table())
        say(f"all runs and comparison.json are in {Path(args.out)}")
    return 0
