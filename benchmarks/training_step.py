"""Peak memory and time of one training step: TAPS against fine-tuning and the naive module, ResNet-50 and ViT-S/16.

    python benchmarks/training_step.py --batch 8 --rounds 3 --json benchmarks/results/avx2/training-step.json

Each variant (step_variants.py) runs in processes of its own, in turn. Memory is the peak resident set less the resident
set after all imports and a tiny step of either kind (the same in every variant), in one process with glibc's mmap
threshold fixed at 128 KiB, so that freed tensors go back to the system at once and the peak is what is alive, not how
the heap happens to be cut up. Times come from `--rounds` other processes with glibc's defaults: medians, and ratios to
the fine-tuning of the same round, since absolute times mean little on a shared machine. The loss is the task's alone;
the penalty adds a sum over the scores. "floor" is the share of fine-tuning's products that the variant cannot do
without.
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
from pathlib import Path
from typing import Any

from step_variants import CLASSES, MODELS, VARIANTS, base, build, floors


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


def child(model: str, variant: str, batch: int, steps: int) -> dict[str, Any]:
    """Run one variant and measure it."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    warm_up()
    with torch.device("meta"):
        shapes = base(model)
    nbytes = sum(tensor.nbytes for tensor in (*shapes.parameters(), *shapes.buffers()))
    baseline = resident()
    forward, parameters = build(model, VARIANTS[variant])
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"peak": resident("VmHWM") - baseline, "seconds": statistics.median(times), "base_bytes": nbytes}


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
    memory, runs = {}, {}
    for variant in args.variants:
        once = ("--child", variant, *size, "--steps", 1)
        memory[variant] = launch(*once, environment={"MALLOC_MMAP_THRESHOLD_": "131072"})
        runs[variant] = []
    for _ in range(args.rounds):
        for variant in args.variants:
            runs[variant].append(launch("--child", variant, *size, "--steps", args.steps))
    rows = []
    for variant in args.variants:
        row = {"variant": variant, "floor": floor[variant], "peak_mib": memory[variant]["peak"] / 2**20}
        if "fine-tuning" in memory:
            plain = memory["fine-tuning"]["peak"]
            row["extra_over_base_bytes"] = (memory[variant]["peak"] - plain) / memory[variant]["base_bytes"]
            row["memory_ratio"] = memory[variant]["peak"] / plain
        row["seconds"] = statistics.median(run["seconds"] for run in runs[variant])
        if "fine-tuning" in runs:
            pairs = zip(runs[variant], runs["fine-tuning"], strict=True)
            row["time_ratio"] = statistics.median(run["seconds"] / plain["seconds"] for run, plain in pairs)
        rows.append(row)
    return {"rows": rows, "memory": memory, "runs": runs}


HEADER = """| model | variant | peak MiB | / fine-tuning | above it, in base sizes | step s | / fine-tuning | floor |
|---|---|---|---|---|---|---|---|"""


def table(model: str, rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, without a header."""
    return "\n".join(
        f"| {model} | {row['variant']} | {row['peak_mib']:.0f} | {row.get('memory_ratio', 1.0):.3f} "
        f"| {row.get('extra_over_base_bytes', 0.0):+.3f} | {row['seconds']:.2f} | {row.get('time_ratio', 1.0):.3f} "
        f"| {row['floor']:.3f} |"
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--floors", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.model, args.child, args.batch, args.steps)))
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
