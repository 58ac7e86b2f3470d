"""`taps merge`: a task file and its base as one plain checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import check_out, emit, size
from .evaluate import add_model_arguments, config_from

PURPOSE = "Write the base with a task in place as a plain safetensors checkpoint, which needs no taps_ext."
EXAMPLE = "taps merge runs/signs/signs.taps --config signs.toml --out signs.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a task file (.taps)")
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the safetensors file to write")


def run(args: argparse.Namespace) -> int:
    from .. import ConfigError, TaskModel, store

    config = config_from(args)
    check_out(args.out, args.file, config.base_section.get("weights"))
    if Path(args.out).suffix != ".safetensors":  # a file that torch.save seems to have written is none it can load
        raise ConfigError(f"out: expected a name that ends in .safetensors, which is written, got {args.out}")
    task = store.load(args.file, kind="task")  # a bad file is told before the base is built
    model = TaskModel(config.base(), head_module=config.head_module)
    name = model.load_task(task)
    tensors = model.task_state_dict(name)
    written = store.write_safetensors(args.out, tensors, {"format": "pt"})
    if args.json:
        emit({"file": args.out, "task": name, "tensors": len(tensors), "bytes": written})
    else:
        print(f"{args.out}: {len(tensors)} tensors, {size(written)}")
    return 0
