"""A training step of eight tasks on a mixed batch beside one model's on the same batch and beside single passes.

    python benchmarks/mixed_training.py [--json FILE]

ResNet-50 and ViT-S/16 at 224 pixels in fp32, 64 images, eight of each task, every layer open. Forward, the sum of the
samples' losses, backward; no optimizer. All take turns; a ratio is the median over rounds of the ratio in a round.

    one      plain fine-tuning of one model on the whole batch
    pieces   the same, eight images at a time: gradients add up
    mixed    model(x, tasks=[...]), one backward
    passes   model(x of a task, task=...) and its backward, eight times

Peaks are the growth of the memory of a process of its own for each variant, from when the model is built to the highest
point of two steps, gradients among it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import forget_peak, resident
from mixed import CLASSES, SIZE, adapted
from step_variants import base
from torch import Tensor
from turns import milliseconds

from taps_ext import ops

BATCH, TASKS, ROUNDS = 64, 8, 5
MODELS = ("vit_small", "resnet50")
VARIANTS = ("one", "pieces", "mixed", "passes")


def batch() -> tuple[Tensor, Tensor, list[str]]:
    torch.manual_seed(1)
    names = [f"t{index % TASKS}" for index in range(BATCH)]
    return torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,)), names


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


def single(name: str, size: int) -> Callable[[], None]:
    """A step of one plain model, `size` images at a time."""
    torch.manual_seed(0)
    model = base(name).train()
    x, target, _ = batch()

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        for images, wanted in zip(x.split(size), target.split(size), strict=True):
            loss_of(model(images), wanted).backward()

    return run


def tasks(name: str, *, mixed: bool) -> Callable[[], None]:
    model = adapted(name, TASKS, 1.0).train()
    x, target, names = batch()
    rows = {name: torch.tensor([k for k, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}
    parameters = list(model.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        if mixed:
            found = model(x, tasks=names)
            losses = [loss_of(output, target[index]) for _, (index, output) in found.items()]
            torch.stack(losses).sum().backward()
            return
        for task, index in rows.items():
            loss_of(model(x[index], task=task), target[index]).backward()

    return run


def step_of(name: str, variant: str) -> Callable[[], None]:
    if variant in ("one", "pieces"):
        return single(name, BATCH if variant == "one" else BATCH // TASKS)
    return tasks(name, mixed=variant == "mixed")


def peak(name: str, variant: str) -> int:
    """Bytes, in this process."""
    run = step_of(name, variant)
    before = forget_peak()
    run()
    run()
    return resident("VmHWM") - before


def measure(name: str) -> dict[str, Any]:
    calls = {variant: step_of(name, variant) for variant in VARIANTS}
    milliseconds(calls, 1)
    found = milliseconds(calls, ROUNDS)
    peaks = {}
    for variant in VARIANTS:
        told = subprocess.run(
            [sys.executable, __file__, "--peak", name, variant], check=True, stdout=subprocess.PIPE, text=True
        )
        peaks[variant] = round(int(told.stdout) / 1e6)
    return {
        "model": name,
        "ms": {variant: round(statistics.median(times), 1) for variant, times in found.items()},
        "over_one": {
            variant: round(statistics.median(b / a for a, b in zip(found["one"], times, strict=True)), 3)
            for variant, times in found.items()
        },
        "peak_mb": peaks,
        "rounds": ROUNDS,
        "isa": None if ops._C is None else ops._C.isa(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the rows, as a list")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "VARIANT"), help="bytes of one variant alone")
    args = parser.parse_args()
    if args.peak is not None:
        print(peak(*args.peak))
        return
    found = []
    for name in MODELS:
        found.append(measure(name))
        print(json.dumps(found[-1]), flush=True)
    if args.json is not None:
        args.json.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in found) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
