"""What `taps profile` and `taps estimate` share: the model, its task and the step that is asked about."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .common import count, size

if TYPE_CHECKING:
    from ..methods import MethodConfig
    from ..model import TaskModel
    from ..profiling import Memory, Operations


def shape(text: str) -> tuple[int, ...]:
    """An argument type: the shape of one sample, `3,224,224`."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes such as 3,224,224, got {text!r}")
    return found


def fraction(text: str) -> float:
    """An argument type: a number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text!r}")
    return value


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="timm:NAME, torchvision:NAME or python:MODULE.FUNCTION")
    parser.add_argument("--task", metavar="FILE", help="a task file whose gates the layers have")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the base's, where a task file belongs to them (safetensors; else pretrained ones are downloaded)",
    )
    parser.add_argument(
        "--method",
        metavar="METHOD",
        help="without a task file: any method, such as lora:8 or selective-lora:8:lam=0.1 (taps)",
    )
    parser.add_argument(
        "--open", metavar="GLOB", nargs="+", help="the layers that are open, all others closed (default: all are open)"
    )
    parser.add_argument(
        "--gate-fraction", type=fraction, help="of a batch that closed layers learn from, with taps (1)"
    )
    parser.add_argument("--phase", choices=["train", "infer"], default="train")
    parser.add_argument("--batch", type=count(1), default=8, help="samples (8)")
    parser.add_argument("--shape", type=shape, default=(3, 224, 224), help="of one sample (3,224,224)")
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="run forwards under autocast")


def _method(text: str, gate_fraction: float | None) -> MethodConfig:
    """The settings of the method that is asked for."""
    from ..methods import parse_methods

    found = parse_methods(text)
    if len(found) != 1:
        raise ConfigError(f"method: expected one, got {list(found)}")
    (config,) = found.values()
    if gate_fraction is None:
        return config
    if not hasattr(config, "gate_fraction"):
        raise ConfigError(f"gate_fraction: expected none with method {text!r}, which has no such setting")
    return replace(config, gate_fraction=gate_fraction)  # type: ignore[call-arg]


def added(model: TaskModel, inputs: Sequence[Any], task: str) -> Operations:
    """What the task's forward computes, and what of it is its own."""
    from ..profiling import operations

    return operations(model, inputs, task=task)


def told(found: Operations) -> str:
    """The same in words."""
    whole, own = (f"{value / 1e9:.4g} GFLOP" for value in (found.forward, found.added))
    where = "" if found.first is None else f", from {found.first} on"
    return f"forward {whole}, of which the task adds {own} to a model that runs others{where}"


def step_model(args: argparse.Namespace) -> tuple[TaskModel, str]:
    """The model and the name of its task; weights are random where none are needed.

    Raises:
        ConfigError: an unknown model, a pattern that matches no layer. TaskFileError: a file that does not fit.
    """
    import torch

    from .. import TaskModel, store
    from ..base.scan import match
    from .base import build_base

    for name in ("open", "method", "gate_fraction"):
        if args.task is not None and getattr(args, name) is not None:
            raise ConfigError(f"{name}: expected none beside a task file, which says it all")
    method = args.method or "taps"
    config = _method(method, args.gate_fraction)
    section: dict[str, Any] = {"model": args.model}
    if args.weights is not None:
        section["weights"] = args.weights
    elif not args.model.startswith("python:"):
        section |= {"weights": "random"} if args.task is None else {"args": {"pretrained": True}}
    task = None if args.task is None else store.load(args.task, kind="task")  # told before the base is built
    model = TaskModel(build_base(section))
    if task is not None:
        return model, model.load_task(task)
    model.add_task("task", config=config)
    state = model.state("task")
    if args.open is not None:
        layers = {name: gate for name, _, gate in state.learned()}
        if not layers:
            raise ConfigError(f"open: method {method!r} has no gates that could be closed")
        opened = match(args.open, list(layers), "open")
        with torch.no_grad():
            for name, gate in layers.items():
                if gate.score is not None and name not in opened:
                    gate.score.fill_(0.5 * gate.threshold)
        state.refresh()
    return model, "task"


def parts(memory: Memory) -> list[tuple[str, str]]:
    """Rows for a table: every part that is there, and the peak."""
    rows = [(name, size(value)) for name, value in asdict(memory).items() if value]
    return [*rows, ("peak", size(memory.peak))]


def step_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the step was, for JSON."""
    facts = {key: getattr(args, key) for key in ("model", "task", "weights", "method", "batch", "optimizer", "amp")}
    return {**facts, "shape": list(args.shape), "gate_fraction": args.gate_fraction, "open": args.open}
