"""`taps extract`: a fine-tuned checkpoint as a task file, without losing a bit."""

from __future__ import annotations

import argparse
import pickle
import re
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

CHECKPOINT is a safetensors file, the model.safetensors.index.json of several or their folder, of which beside
the base one layer at a time is in memory; or a file that torch.save wrote (.pth, .pt, .bin), of which tensors
alone are read (no pickled code runs), all at once.

With --top-fraction X of each layer's Delta (checkpoint - base) the fraction X of its elements is kept, those of
largest magnitude, by the codec bitmask; what that lost of each layer is told, and recorded in the file
(docs/packed.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="all tensors of the fine-tuned model")
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="FILE", required=True, help="the task file to write (.taps)")
    parser.add_argument("--name", help="the task's name (default: that of the file to write)")
    parser.add_argument("--key", help="where a .pth file keeps the tensors, such as state_dict or model_ema")
    parser.add_argument("--exclude", metavar="GLOB", action="append", help="modules that are the base's; repeatable")
    parser.add_argument(
        "--top-fraction", type=_fraction, metavar="X", help="keep so many of each layer's elements, the largest, alone"
    )
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line")


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}") from None


def _torch_file(path: str, key: str | None) -> dict[str, Tensor]:
    import torch

    from ..store.errors import show

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file of anything else makes the reader of pickles raise whatever it meets
        refused = isinstance(error, pickle.UnpicklingError)
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error)) if refused else None
        if found is not None:  # torch's own words lead to running the file's code
            raise ConfigError(
                f"checkpoint: {path}: expected tensors by name alone, which torch.save(model.state_dict(), ...) "
                f"writes, got {show(found.group(1))}, whose code is not run here"
            ) from None
        reason = "other bytes" if refused else " ".join(str(error).split())[:200]
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


def checkpoint_of(path: str, key: str | None) -> dict[str, Tensor] | str:
    """The tensors of a torch file; the path of safetensors files, which are read layer by layer.

    Raises:
        ConfigError: no file of tensors, or `key` is not in it.
    """
    if Path(path).suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar"):
        return _torch_file(path, key)
    if key is not None:
        raise ConfigError(f"key: expected none, since {path} is read as a safetensors file")
    return path


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
    given = checkpoint_of(args.checkpoint, args.key)
    model = TaskModel(config.base(), head_module=config.head_module, unsupported=config.unsupported)
    done = model.extract_file(
        args.name or Path(args.out).stem,
        given,
        args.out,
        config=FullConfig(exclude_modules=args.exclude),
        top_fraction=args.top_fraction,
        labels=None if args.labels is None else lambda outputs: read_labels(args.labels, outputs),
    )
    if args.json:
        emit({"file": args.out, **done.to_dict()})
        return 0
    if done.packing is not None:
        print(done.packing.table())
    print(
        f"{args.out}: task {done.task!r}, {size(done.bytes)}; {done.layers_open} of {done.layers} layers differ "
        f"from the base: {done.as_deltas} stored as deltas, {done.as_weights} as whole weights"
    )
    return 0
