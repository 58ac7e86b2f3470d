"""`taps train`: adapt a base to the tasks of a configuration."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .common import emit, say, size, table
from .config import check_input, load_config
from .dense import dense_tasks, shown

PURPOSE = "Train the tasks of a configuration; an interrupted run goes on where it stopped."
EXAMPLE = "taps train signs.toml train.epochs=10 method.lam=0.5"
LAST = "overrides"
MORE = """

a configuration:
  [base]
  model = "timm:resnet50"                    # or torchvision:NAME, python:MODULE.FUNCTION
  args = {pretrained = true}                 # or weights = "base.safetensors"
  [data]
  size = 224                                 # normalize = "base" (default), "imagenet", "none" or [mean, std]
  [method]
  method = "taps"                            # or full, probe, lora, ...
  lam = 0.5
  [train]
  epochs = 30
  [tasks.signs]
  source = "imagefolder:data/signs"          # or npz:FILE, python:MODULE.FUNCTION, digits:NAME, glyphs:NAME
  [tasks.roads]                              # maps of images, all tasks of a configuration or none (docs/dense.md)
  source = "dense:data/roads"
  kind = "segmentation"                      # or boundaries, distance, edges, saliency, depth, normals
  classes = ["sky", "road"]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="base, data, method, train, tasks.NAME")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings over the file's, as TOML"
    )
    parser.add_argument(
        "--mode",
        choices=("incremental", "joint", "lean"),
        default="incremental",
        help="one task after another (default), all together with what they share, or first that and then each task",
    )
    parser.add_argument("--restart", action="store_true", help="start over instead of resuming")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if not config.tasks:
        raise ConfigError(f"{args.config}: expected at least one [tasks.NAME] section, got none")
    settings = config.training()
    methods = {name: config.method_of(name) for name in config.tasks}
    base = config.base()

    import torch

    from .. import TaskModel
    from ..train import Task, Trainer

    model = TaskModel(base, head_module=config.head_module, unsupported=config.unsupported)
    if config.normalize is not None and not args.quiet:
        mean, std = config.normalize
        say(f"images are normalised with mean {list(mean)}, std {list(std)}")
    tasks: dict[str, Task] = {}
    if config.dense:
        for name, made in dense_tasks(config, base).items():
            check_input(base, made.task.train[0][0], config.tasks[name]["source"])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                model.add_task(name, head=made.head(base), config=methods[name])
            tasks[name] = made.task
    for name, section in () if config.dense else config.tasks.items():
        source = config.source(name)
        check_input(base, source.train[0][0], source.name)
        classes = section.get("num_classes", source.num_classes)
        if isinstance(classes, int) and classes < source.num_classes:
            raise ConfigError(
                f"tasks.{name}.num_classes: expected >= {source.num_classes} for {source.name}, got {classes}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # a head does not depend on the tasks before it
            own = classes if methods[name].own_head else None  # else the base's own head is the task's
            model.add_task(name, num_classes=own, config=methods[name])
        labels = [*source.classes, *(str(i) for i in range(source.num_classes, classes))]
        tasks[name] = Task(
            train=source.train,
            val=source.val,
            test=source.test,
            labels=labels,
            preprocessing=source.preprocessing,
        )
    trainer = Trainer(model, tasks, settings, quiet=args.quiet)
    results = trainer.fit(args.mode, resume=False if args.restart else "auto")

    summary: dict[str, Any] = {}
    for name, result in results.items():
        report = model.report(name)
        entry = {key: value for key, value in asdict(result).items() if key not in ("task", "history")}
        stored = Path(result.file).stat().st_size if result.file else None
        summary[name] = {
            "method": report.method,
            "source": config.tasks[name]["source"],
            **entry,
            "layers": len(report.rows),
            "parameters": report.parameters,
            "bytes": stored,
        }
    if args.json:
        emit({"out": settings.out, "seed": settings.seed, "tasks": summary})
    else:
        headers = ("task", "method", "val", "test", "epoch", "layers open", "weights", "parameters", "file")
        rows = [
            (
                name,
                entry["method"],
                shown(tasks[name], entry["val"]),
                shown(tasks[name], entry["test"]),
                entry["epoch"],
                f"{entry['layers_open']} of {entry['layers']}",
                f"{100 * entry['share']:.1f} %",
                f"{entry['parameters']:,}",
                size(entry["bytes"] or 0),
            )
            for name, entry in summary.items()
        ]
        print(table(headers, rows))
        if not args.quiet:
            say(f"task files, metrics.jsonl and results are in {settings.out}")
    return 0
