"""`taps eval`: the metrics of task files on a split of their data."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError
from .common import count, emit, table
from .config import Config, check_device, check_input, load_config
from .dense import base_for, dense_tasks, shown
from .images import check_geometry, map_notes, stored_geometry

PURPOSE = "Measure task files on the test split of their data."
EXAMPLE = "taps eval runs/signs/*.taps --config signs.toml"
LAST = "files"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the base comes from: a configuration, or options of the same meaning."""
    parser.add_argument("--config", metavar="CONFIG.toml", help="the configuration of the training")
    parser.add_argument("--set", metavar="key=value", action="append", default=[], help="override; repeatable")
    parser.add_argument("--base", metavar="MODEL", help="timm:NAME, torchvision:NAME, python:MODULE.FUNCTION")
    parser.add_argument("--weights", metavar="FILE", help="the base's safetensors file, or an index or folder of some")


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the base and the data come from, and where they are to run."""
    add_model_arguments(parser)
    parser.add_argument("--size", type=count(1), metavar="N", help="side of the images in pixels")
    parser.add_argument("--channels", type=count(1), metavar="N", help="1 (grey) or 3 (RGB)")
    parser.add_argument("--device", help="cpu (the default) or cuda[:N]")


def config_from(args: argparse.Namespace) -> Config:
    """The configuration that the arguments ask for."""
    if args.config is None and args.base is None:
        raise ConfigError("base: expected --config CONFIG.toml or --base MODEL, got neither")
    given = {
        "base": {"model": args.base, "weights": args.weights},
        "data": {key: getattr(args, key, None) for key in ("size", "channels")},
    }
    extra = {s: {k: v for k, v in values.items() if v is not None} for s, values in given.items()}
    check_device(getattr(args, "device", None))
    return load_config(args.config, args.set, {s: values for s, values in extra.items() if values})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="task files (.taps)")
    add_base_arguments(parser)
    parser.add_argument("--task", help="the [tasks.NAME] whose data to use (default: the name in the file)")
    parser.add_argument("--source", help="a data source, such as digits:rotated, instead")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: test")


def run(args: argparse.Namespace) -> int:
    from .. import TaskModel, store
    from ..train import Task, TrainConfig, Trainer

    config = config_from(args)
    tasks = [(file, store.load(file, kind="task")) for file in args.files]
    notes = map_notes(tasks[0][1])
    base = base_for(config, notes)
    model = TaskModel(base, head_module=config.head_module)
    if args.device is not None:
        model.to(args.device)
    results: list[dict[str, Any]] = []
    for file, task in tasks:
        section = args.task or task.name
        if (map_notes(task) is None) != (notes is None):
            raise ConfigError(f"files: expected tasks of one kind of base, got {tasks[0][0]} and {file}")
        if notes is not None:
            if args.source:
                raise ConfigError("source: expected none for tasks of maps, whose section says how they are made")
            known_task = dense_tasks(config, base, [section])[section].task
            data, source_name = getattr(known_task, args.split), str(config.task(section)["source"])
            if data is None:
                raise ConfigError(f"split: {source_name} has no {args.split!r}")
            if task.labels is not None and task.labels != known_task.labels:
                raise ConfigError(f"source: {source_name} has other classes than {file} was trained on")
            check_geometry(task, known_task.preprocessing or {})
        else:
            stored = stored_geometry(task)
            source = config.open(args.source, stored) if args.source else config.source(section, stored)
            data, source_name = source.splits().get(args.split), source.name
            if data is None:
                known = list(source.splits())
                raise ConfigError(f"split: expected one of {known} of {source.name}, got {args.split!r}")
            labels = task.labels
            if labels is not None and tuple(labels[: source.num_classes]) != source.classes:
                raise ConfigError(f"source: {source.name} has other classes than {file} was trained on")
            check_geometry(task, source.preprocessing)
            known_task = Task(train=data)
        check_input(base, data[0][0], source_name)
        name = model.load_task(task)
        trainer = Trainer(model, {name: known_task}, TrainConfig(), quiet=True)
        metrics = trainer.evaluate(name, data)
        report = model.report(name)
        model.delete_task(name)
        results.append(
            {
                "file": file,
                "task": name,
                "method": report.method,
                "source": source_name,
                "split": args.split,
                "samples": len(data),
                **metrics,
                **({} if notes is None else {"metric": shown(known_task, metrics)}),
                "layers_open": report.layers_open,
                "layers": len(report.rows),
                "share": report.share,
            }
        )
    if args.json:
        emit(results)
    else:
        measured = "accuracy" if notes is None else "metric"
        columns = ("file", "task", "method", "data", "samples", measured, "loss", "layers open")
        rows = [
            (
                r["file"],
                r["task"],
                r["method"],
                f"{r['source']} {r['split']}",
                r["samples"],
                f"{100 * r['accuracy']:.2f} %" if notes is None else r["metric"],
                f"{r['loss']:.4f}",
                f"{r['layers_open']} of {r['layers']}",
            )
            for r in results
        ]
        print(table(columns, rows))
    return 0
