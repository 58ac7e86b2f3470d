"""`taps estimate`: the peak memory of a task's step, before running it."""

from __future__ import annotations

import argparse

from .common import emit, table
from .costs import add_step_arguments, added, parts, step_model, told

PURPOSE = "Predict a step's peak memory, and the operations that a task adds, without running it."
BOUND = "on a CPU a lower bound where there are convolutions: what they copy inside is not counted"
MORE = f"""

The peak is that of what operators return: {BOUND}."""
EXAMPLE = "taps estimate timm:vit_small_patch16_224 --batch 32 --optimizer adamw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_step_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from ..profiling import estimate

    model, task = step_model(args)
    inputs = (torch.empty(args.batch, *args.shape, device="meta"),)
    memory = estimate(model, inputs, task=task, phase=args.phase, optimizer=args.optimizer, amp=args.amp)
    found = added(model, inputs, task)
    if args.json:
        emit({**memory.to_dict(), "operations": found.to_dict()})
    else:
        print(table(("part", "memory"), parts(memory)))
        print(BOUND)
        print(told(found))
    return 0
