"""`taps profile`: time and memory of a task's step, layer by layer, against the machine's limits."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..plot.canvas import check_picture
from .common import count, emit, say
from .costs import add_step_arguments, added, step_facts, step_model, told

PURPOSE = "Measure a training step or a forward: each layer against this machine's limits, and memory by its parts."
EXAMPLE = "taps profile timm:resnet50 --batch 8 --gate-fraction 0.125 --open 'layer4.*' --plot step.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_step_arguments(parser)
    parser.add_argument("--steps", type=count(1), default=5, help="steps that are timed (5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N] (cpu)")
    parser.add_argument("--threads", type=count(1), help="CPU threads (torch's default)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw memory over time and layers against the roofs")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..profiling import profile
    from .config import check_device

    check_device(args.device)
    if args.plot is not None:
        check_picture(args.plot)
    if args.device == "meta":
        raise ConfigError("device: expected one that computes, got 'meta'; `taps estimate` runs nothing")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, task = step_model(args)
    model.to(args.device)
    inputs = (torch.randn(args.batch, *args.shape, device=args.device),)
    found = profile(
        model,
        inputs,
        task=task,
        phase=args.phase,
        optimizer=args.optimizer,
        amp=args.amp,
        steps=args.steps,
    )
    work = added(model, inputs, task)
    if args.json:
        emit({**found.to_dict(), "step": step_facts(args), "operations": work.to_dict()})
    else:
        print(found.table())
        print(told(work))
    if args.plot is not None:
        found.plot(args.plot)
        say(f"wrote {args.plot}")
    return 0
