"""Peak memory and time of one training step: TAPS against fine-tuning and the naive module, ResNet-50 and ViT-S/16.

    python benchmarks/training_step.py --batch 8 --rounds 24 --json benchmarks/results/avx2/training-step.json

Each variant (step_variants.py) has processes of its own. Memory is the peak resident set less the resident set after
all imports and a tiny step of either kind (the same in every variant), in one process with glibc's mmap threshold fixed
at 128 KiB, so that freed tensors go back to the system at once and the peak is what is alive, not how the heap happens
to be cut up. Times come from other processes with glibc's defaults, one for each variant, all alive (12 GB) and one at
work: a step of fine-tuning, a step of a variant, a step of fine-tuning, a step of the next. A ratio is that of a step
to the mean of its two neighbours, since a shared machine's speed changes within seconds; given are the median of
`--rounds` such ratios and their quartiles. The loss is the task's alone; the penalty adds a sum over the scores.
"floor" is the share of fine-tuning's products that the variant cannot do without.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from step_variants import CLASSES, MODELS, VARIANTS, base, build, floors

PLAIN = "fine-tuning"


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process's resident set (VmRSS) or its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def warm_up() -> None:
    """A tiny training step, plain and with TAPS: the code and the threads that a first step loads."""
    import timm  # noqa: F401
    import torch
    import torch.nn.functional as F
    import torchvision  # noqa: F401
    from torch import nn

    import taps_ext

    inputs, targets = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    for wrapped in (False, True):
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten()]
        net: Any = nn.Sequential(*layers, nn.Linear(8 * 36, 4))
        if wrapped:
            net = taps_ext.TaskModel(net, taps_ext.TapsConfig(lam=0.5))
            net.add_task("t", num_classes=4)
            net.set_task("t")
        groups: Any = net.parameter_groups(lr=0.1) if wrapped else net.parameters()
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()


def stepper(model: str, variant: str, batch: int) -> Callable[[], None]:
    """A variant's training step."""
    import torch
    import torch.nn.functional as F

    forward, parameters = build(model, VARIANTS[variant])
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step


def peak(model: str, variant: str, batch: int) -> dict[str, int]:
    """What two steps of one variant take in this process, in bytes, and what the base is."""
    import torch

    torch.manual_seed(0)
    warm_up()
    with torch.device("meta"):
        shapes = base(model)
    baseline = resident()
    step = stepper(model, variant, batch)
    step()
    step()
    nbytes = sum(tensor.nbytes for tensor in (*shapes.parameters(), *shapes.buffers()))
    return {"peak": resident("VmHWM") - baseline, "base_bytes": nbytes}


def serve(model: str, variant: str, batch: int) -> None:
    """A step for each line of the standard input, and a line for each step: the seconds that it took."""
    import torch

    torch.manual_seed(0)
    step = stepper(model, variant, batch)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """A process that serves the steps of one variant."""

    def __init__(self, model: str, variant: str, batch: int) -> None:
        command = [sys.executable, __file__, "--serve", variant, "--model", model, "--batch", str(batch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def step(self) -> float:
        """The seconds that one step took. SystemExit when the process is gone, which has said why."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            return float(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            code = self.close()
            raise SystemExit(
                f"{' '.join(map(str, self.process.args))}: no seconds came; it ended with {code}"
            ) from None

    def close(self) -> int:
        """End the process, which waits for the next line; its exit status."""
        with suppress(BrokenPipeError):
            self.process.communicate()
        return self.process.wait()


def take_turns(model: str, args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Of each variant and round: a step's seconds, those of fine-tuning's step before it and of the one after."""
    runs: dict[str, list[list[float]]] = {variant: [] for variant in args.variants}
    with ExitStack() as stack:
        workers = {variant: Worker(model, variant, args.batch) for variant in (PLAIN, *args.variants)}
        for worker in workers.values():
            stack.callback(worker.close)
        for worker in workers.values():  # the first makes the optimizer's state, the second is like all that follow
            worker.step()
            worker.step()
        after = workers[PLAIN].step()
        for _ in range(args.rounds):
            for variant, found in runs.items():
                before, seconds, after = after, workers[variant].step(), workers[PLAIN].step()
                found.append([seconds, before, after])
    return runs


def launch(*arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Run this file in a process of its own; what it prints last is JSON."""
    command = [sys.executable, __file__, *(str(argument) for argument in arguments)]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, Any]:
    import torch

    import taps_ext

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "taps_ext": taps_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model: a row for each variant, and all that the rows are made of."""
    size = ("--batch", args.batch, "--model", model)
    floor = launch("--floors", *size)
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    memory = {variant: launch("--peak", variant, *size, environment=fixed) for variant in (PLAIN, *args.variants)}
    runs = take_turns(model, args)
    plain, base_bytes = memory[PLAIN]["peak"], memory[PLAIN]["base_bytes"]
    steps = [before for found in runs.values() for _, before, _ in found]
    rows = [{"variant": PLAIN, "floor": floor[PLAIN], "peak_mib": plain / 2**20, "seconds": statistics.median(steps)}]
    for variant, found in runs.items():
        over = memory[variant]["peak"]
        row = {"variant": variant, "floor": floor[variant], "peak_mib": over / 2**20, "memory_ratio": over / plain}
        row["extra_over_base_bytes"] = (over - plain) / base_bytes
        row["seconds"] = statistics.median(seconds for seconds, _, _ in found)
        ratios = [2 * seconds / (before + after) for seconds, before, after in found]
        row["time_quartiles"] = statistics.quantiles(ratios, n=4, method="inclusive")
        row["time_ratio"] = row["time_quartiles"][1]
        rows.append(row)
    return {"rows": rows, "memory": memory, "runs": runs}


HEADER = """| model | variant | peak MiB | / fine-tuning | above it, in base sizes | step s | / fine-tuning | floor |
|---|---|---|---|---|---|---|---|"""


def table(model: str, rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, without a header."""
    lines = []
    for row in rows:
        low, ratio, high = row.get("time_quartiles", (None, row.get("time_ratio", 1.0), None))
        spread = "" if low is None else f" ({low:.2f}-{high:.2f})"
        lines.append(
            f"| {model} | {row['variant']} | {row['peak_mib']:.0f} | {row.get('memory_ratio', 1.0):.3f} "
            f"| {row.get('extra_over_base_bytes', 0.0):+.3f} | {row['seconds']:.2f} | {ratio:.3f}{spread} "
            f"| {row['floor']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [variant for variant in VARIANTS if variant != PLAIN]
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=others, default=others)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--floors", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch: at least 1 was expected; got {args.batch}")
    if args.rounds < 2:
        parser.error(f"--rounds: at least 2 were expected, for quartiles; got {args.rounds}")
    if args.serve:
        serve(args.model, args.serve, args.batch)
        return
    if args.peak:
        print(json.dumps(peak(args.model, args.peak, args.batch)))
        return
    if args.floors:
        print(json.dumps(floors(args.model, args.batch)))
        return
    found = {}
    print(HEADER, flush=True)
    for model in args.models:
        found[model] = measure(model, args)
        print(table(model, found[model]["rows"]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"versions": versions(), "batch": args.batch, "models": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
