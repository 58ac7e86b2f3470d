"""`taps merge`: a task file and its base as one plain checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import check_out, emit, size
from .evaluate import add_model_arguments, config_from

PURPOSE = "Write the base with a task in place as a plain safetensors checkpoint, which needs no taps_ext."
EXAMPLE = "taps merge runs/signs/signs.taps --config signs.toml --out signs.safetensors"
MORE = """

Beside the base one layer of the task is in memory at a time. The base's weights may be a safetensors file, the
model.safetensors.index.json of several or their folder."""


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
    store.read_header(args.file, kind="task")  # a bad file is told before the base is built
    model = TaskModel(config.base(), head_module=config.head_module)
    done = model.merge_file(args.file, args.out)
    if args.json:
        emit({"file": args.out, "task": done.task, "tensors": done.tensors, "bytes": done.bytes})
    else:
        print(f"{args.out}: {done.tensors} tensors, {size(done.bytes)}")
    return 0
