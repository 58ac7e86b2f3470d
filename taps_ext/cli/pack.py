"""`taps pack`: a task's file in fewer bytes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common import check_out, count, emit, size
from .config import Config, check_input
from .evaluate import add_base_arguments, config_from
from .images import map_notes

if TYPE_CHECKING:
    import torch

    from ..model import Packing, TaskModel
    from ..store import TaskFile

LEFT = ("dense", "whole")  # layers as they were

PURPOSE = "Pack the Deltas of a task file: without loss, by a codec, a bound for the error, or a budget of bytes."
EXAMPLE = "taps pack runs/signs/signs.taps --codec int8 --out signs.int8.taps"
MORE = """

codecs: bitmask (without loss; the default), bitmask:SHARE, int8, int4, sign, lowrank:RANK (docs/packed.md)
No base is needed. With --config (or --base and --source) errors are those of the layers' own outputs on
samples of the task's data, and accuracy and agreement before and after are told."""


def _bound(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a task file (.taps)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--codec", metavar="CODEC", help="for all layers")
    how.add_argument("--max-error", type=_bound, metavar="E", help="fewest bytes with a relative error of E a layer")
    how.add_argument("--budget", type=count(0), metavar="BYTES", help="least error in so many bytes of all layers")
    parser.add_argument("--out", metavar="FILE", required=True, help="the task file to write")
    add_base_arguments(parser)
    parser.add_argument("--task", help="the [tasks.NAME] whose data to use (default: the name in the file)")
    parser.add_argument("--source", help="a data source, such as digits:rotated, instead")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="default: val")
    parser.add_argument("--samples", type=count(1), default=64, metavar="N", help="that errors are measured on")


def run(args: argparse.Namespace) -> int:
    from ..files.pack import pack_file
    from ..parts.packing import Rule

    rule = Rule.of(args.codec, args.max_error, args.budget)
    with_data = args.config is not None or args.base is not None
    if not with_data:
        check_out(args.out, args.file)
        packing, written = pack_file(args.file, args.out, rule)
        facts: dict[str, Any] = {}
    else:
        config = config_from(args)
        check_out(args.out, args.file, config.base_section.get("weights"))
        packing, written, facts = _on_data(args, config)
    if args.json:
        emit({"file": args.out, "written": written, **packing.to_dict(), **facts})
        return 0
    print(packing.table())
    if facts:
        print(
            f"accuracy {100 * facts['accuracy_before']:.2f} % before, {100 * facts['accuracy']:.2f} % now; the same "
            f"answer for {100 * facts['agreement']:.2f} % of {facts['samples']} samples of {facts['data']}"
        )
    print(f"{args.out}: {size(written)}")
    if all(row.codec in LEFT for row in packing.rows):
        print("no layer takes fewer bytes so: all are as they were, and there is nothing to unpack")
    return 0


def _on_data(args: argparse.Namespace, config: Config) -> tuple[Packing, int, dict[str, Any]]:
    import torch

    from .. import ConfigError, TaskModel, store

    task = store.load(args.file, kind="task")
    if map_notes(task) is not None:
        raise ConfigError("config: expected a task of classes to measure on its data, got one of maps; pack without it")
    base = config.base()
    model = TaskModel(base, head_module=config.head_module).eval()
    if args.device is not None:
        model.to(args.device)
    source = config.open(args.source) if args.source else config.source(args.task or task.name)
    data = source.splits().get(args.split)
    if data is None:
        raise ConfigError(f"split: expected one of {list(source.splits())} of {source.name}, got {args.split!r}")
    check_input(base, data[0][0], source.name)
    name = model.load_task(task)
    device = next(base.parameters()).device
    some = torch.stack([data[i][0] for i in range(min(args.samples, len(data)))]).to(device)
    labels = torch.tensor([int(data[i][1]) for i in range(len(data))])
    before = _answers(model, name, data, device)
    rule_arguments = {"codec": args.codec, "max_error": args.max_error, "budget": args.budget}
    packing = model.pack_task(name, data=some, **rule_arguments)
    after = _answers(model, name, data, device)
    written = _save(model, name, task, args.out)
    facts = {
        "data": f"{source.name} {args.split}",
        "samples": len(data),
        "accuracy_before": float((before == labels).double().mean()),
        "accuracy": float((after == labels).double().mean()),
        "agreement": float((before == after).double().mean()),
    }
    return packing, written, facts


def _answers(model: TaskModel, name: str, data: Any, device: torch.device) -> torch.Tensor:
    """The class that the task finds for each sample."""
    import torch

    found = []
    with torch.no_grad():
        for begin in range(0, len(data), 64):
            batch = torch.stack([data[i][0] for i in range(begin, min(begin + 64, len(data)))])
            found.append(model(batch.to(device), task=name).argmax(dim=1).cpu())
    return torch.cat(found)


def _save(model: TaskModel, name: str, task: TaskFile, out: str) -> int:
    """The file that was read, with the parts as they are now."""
    import dataclasses
    from pathlib import Path

    from .. import store
    from ..files.task import to_records

    state = model.state(name)
    parts = to_records(state.table, state.open_layers())
    versions = store.task_file.current_versions()
    return store.save(Path(out), dataclasses.replace(task, parts=parts, versions=versions, complete=True))
