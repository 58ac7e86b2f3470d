"""One checkout's side of beside.py: makes the cases of a part, and times blocks of their calls as it is asked.

A request is a line of JSON on the standard input, a list of a method's name and its arguments; its answer is a line,
too. The package comes from PYTHONPATH. Of it, only what both checkouts have is used: `taps_ext.bench`, which holds the
layers, and the public interface. Every case has a variant "stock", which runs none of the package's code.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_variants import CLASSES, MODELS, base, of_role
from torch import nn
from training_step import stepper

import taps_ext
from taps_ext import bench, ops
from taps_ext.zoo import SmallResNet

Run = Callable[[int], Any]
SIZE, BATCH = 224, 8  # of an image; of a training step


@dataclass(frozen=True)
class Entry:
    """A case: the number of its layer's or model's weights, and what makes its variants."""

    name: str
    weights: int
    gradients: bool
    make: Callable[[], dict[str, Run]]


def weights_of(layer: str) -> int:
    """Of a layer of `taps bench`, which are named by their sizes."""
    if linear := re.match(r"(\d+) x (\d+)", layer):
        return int(linear[1]) * int(linear[2])
    if convolution := re.match(r"(\d+) -> (\d+), (\d+)x(\d+) ", layer):
        return int(convolution[1]) * int(convolution[2]) * int(convolution[3]) * int(convolution[4])
    return weights_in(SmallResNet(10, 3, blocks=2))


def weights_in(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)


def layers() -> Iterator[Entry]:
    for case in bench.suite(full=True):

        def make(case: bench.Case = case) -> dict[str, Run]:
            variants = case.make()
            return {name: variants[name] for name in ("stock", "taps")}

        yield Entry(case.name, weights_of(case.layer), case.gradients, make)


def task_model(model: str, is_open: bool) -> taps_ext.TaskModel:
    """A task whose gates are all open, or all closed, and whose Deltas are small and random."""
    tasks = taps_ext.TaskModel(base(model), taps_ext.TapsConfig(lam=0.5))
    tasks.add_task("t", num_classes=CLASSES)
    with torch.no_grad():
        for delta, score in zip(of_role(tasks, "delta"), of_role(tasks, "score"), strict=True):
            delta.normal_(std=1e-3)
            score.fill_(0.15 if is_open else 0.05)
    tasks.set_task("t")
    return tasks.eval()


def model_weights(model: str) -> int:
    with torch.device("meta"):
        return weights_in(base(model))


def forwards() -> Iterator[Entry]:
    for model in MODELS:
        for images, dtype in ((1, torch.float32), (8, torch.float32), (1, torch.bfloat16)):

            def make(model: str = model, images: int = images, dtype: torch.dtype = dtype) -> dict[str, Run]:
                x = torch.randn(images, 3, SIZE, SIZE).to(dtype)
                models: dict[str, Any] = {
                    "stock": base(model).eval().to(dtype),
                    "all open": task_model(model, True).to(dtype),
                    "all closed": task_model(model, False).to(dtype),
                }
                return {name: lambda i, made=made: made(x) for name, made in models.items()}  # type: ignore[misc]

            name = f"{model}, images: {images}, {str(dtype).removeprefix('torch.')}"
            yield Entry(name, model_weights(model), False, make)


def steps() -> Iterator[Entry]:
    for model in MODELS:

        def make(model: str = model) -> dict[str, Run]:
            variants = {"stock": "fine-tuning", "all open": "all open", "pattern": "pattern"}
            made = {name: stepper(model, variant, BATCH) for name, variant in variants.items()}
            return {name: lambda i, step=step: step() for name, step in made.items()}  # type: ignore[misc]

        yield Entry(f"{model}, batch {BATCH}", model_weights(model), True, make)


PARTS = {"layers": layers, "forwards": forwards, "steps": steps}


class Worker:
    """Its methods are what can be asked for. At any time it holds one case."""

    def __init__(self, part: str) -> None:
        self.entries = {entry.name: entry for entry in PARTS[part]()}
        self.variants: dict[str, Run] = {}
        self.turns: dict[str, int] = {}
        self.kept: Any = None
        bench.keep_freed_memory()

    def facts(self) -> dict[str, Any]:
        """Where the package is, and what it runs on."""
        found = re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        extension = ops._C
        return {
            "package": taps_ext.__file__,
            "extension": None if extension is None else extension.__file__,
            "machine": {
                "isa": None if extension is None else extension.isa(),
                "vendor": found[1] if found else platform.machine(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }

    def cases(self) -> dict[str, int]:
        """The number of weights of each."""
        return {name: entry.weights for name, entry in self.entries.items()}

    def make(self, name: str) -> list[str]:
        """The variants of a case, which takes the place of the one before."""
        self.variants, self.kept = {}, None
        gc.collect()
        torch.manual_seed(0)
        entry = self.entries[name]
        torch.set_grad_enabled(entry.gradients)
        self.variants = entry.make()
        # Numbers by which calls pick among weights that take turns: no variant finds those that another has just read.
        self.turns = {variant: place * 10_007 for place, variant in enumerate(self.variants)}
        return list(self.variants)

    def alone(self, variant: str) -> float:
        """About what a call takes: the least of four, or of two where they are long."""
        found: list[float] = []
        while len(found) < 2 or (len(found) < 4 and sum(found) < 0.2):
            found.append(self.block(variant, 1, 0))
        return min(found)

    def block(self, variant: str, calls: int, before: int) -> float:
        """Seconds of a call: the mean of some in a row, after others that are not timed."""
        self._call(variant, before)
        start = time.perf_counter()
        self._call(variant, calls)
        return (time.perf_counter() - start) / calls

    def _call(self, variant: str, count: int) -> None:
        run, turn = self.variants[variant], self.turns[variant]
        for index in range(turn, turn + count):
            self.kept = run(index)  # the last result lives on: the heap does not shrink and grow between two calls
        self.turns[variant] = turn + count


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
