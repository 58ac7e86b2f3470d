"""`taps extract`: a fine-tuned checkpoint as a task file, without losing a bit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .common import check_out, emit, size
from .evaluate import add_model_arguments, config_from

if TYPE_CHECKING:
    from torch import Tensor

PURPOSE = "Make a task file of a fine-tuned copy of the base, bit for bit; `taps merge` is the way back."
EXAMPLE = "taps extract birds.safetensors --config base.toml --out birds.taps"
MORE = """

CHECKPOINT is a safetensors file, or one that torch.save wrote (.pth, .pt, .bin), of which tensors alone are read
(no pickled code runs)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="all tensors of the fine-tuned model")
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the task file to write (.taps)")
    parser.add_argument("--name", help="the task's name (default: that of the file to write)")
    parser.add_argument("--key", help="where a .pth file keeps the tensors, such as state_dict or model_ema")
    parser.add_argument("--exclude", metavar="GLOB", action="append", help="modules that are the base's; repeatable")
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line")


def _torch_file(path: str, key: str | None) -> dict[str, Tensor]:
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of anything else makes the reader of pickles raise whatever it meets
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"checkpoint: {path}: expected a file of tensors by torch.save, got {reason}") from None
    known = (
        sorted(k for k, v in content.items() if isinstance(k, str) and isinstance(v, dict))
        if isinstance(content, dict)
        else []
    )
    if key is not None:
        if key not in known:
            raise ConfigError(f"key: expected one of {known} of {path}, got {key!r}")
        content = content[key]
    elif not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ConfigError(
            f"checkpoint: {path}: expected tensors by name, got other things; name one of {known} with --key"
        )
    return dict(content)


def read_checkpoint(path: str, key: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file.

    Raises:
        ConfigError: no file of tensors, or `key` is not in it. TaskFileError: no sound safetensors file.
    """
    if Path(path).suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar"):
        return _torch_file(path, key)
    if key is not None:
        raise ConfigError(f"key: expected none, since {path} is read as a safetensors file")
    from .. import store

    tensors, metadata = store.read_safetensors(path)
    if "taps.format" in metadata:
        raise ConfigError(
            f"checkpoint: {path}: expected all tensors of a fine-tuned model, got a file of taps_ext's own; "
            "`taps merge` makes a checkpoint of a task file"
        )
    return tensors


def read_labels(path: str, outputs: int) -> list[str]:
    """Class names, one a line. Raises ConfigError unless there is one for each output."""
    try:
        labels = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"labels: {path}: expected text in UTF-8") from None
    if len(labels) != outputs or not all(label.strip() for label in labels):
        raise ConfigError(f"labels: {path}: expected {outputs} lines of text, got {len(labels)}")
    return labels


def run(args: argparse.Namespace) -> int:
    from .. import FullConfig, TaskModel

    config = config_from(args)
    check_out(args.out, args.checkpoint, args.labels, config.base_section.get("weights"))
    tensors = read_checkpoint(args.checkpoint, args.key)
    model = TaskModel(config.base(), head_module=config.head_module)
    name = args.name or Path(args.out).stem
    model.extract_task(name, tensors, config=FullConfig(exclude_modules=args.exclude))
    labels = None
    if args.labels is not None:
        head = model.state(name).head
        if head is None:
            raise ConfigError("labels: expected a task with a head, got none")
        labels = read_labels(args.labels, len(list(head.parameters())[-1]))
    written = model.save_task(name, args.out, labels=labels)
    report = model.report(name)
    whole = sum(row.open and row.change == "whole" for row in report.rows)
    facts = {
        "file": args.out,
        "task": name,
        "bytes": written,
        "layers": len(report.rows),
        "layers_open": report.layers_open,
        "as_weights": whole,
        "as_deltas": report.layers_open - whole,
    }
    if args.json:
        emit(facts)
    else:
        print(
            f"{args.out}: task {name!r}, {size(written)}; {report.layers_open} of {len(report.rows)} layers differ "
            f"from the base: {report.layers_open - whole} stored as deltas, {whole} as whole weights"
        )
    return 0
