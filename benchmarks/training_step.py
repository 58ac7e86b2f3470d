"""Peak memory and time of one training step: TAPS against fine-tuning and the naive module, torchvision ResNet-50.

    python benchmarks/training_step.py --batch 8 --rounds 3 --json benchmarks/results/training-step.json

Each variant runs in processes of its own, in turn. Memory is the peak resident set less the resident set after all
imports and a tiny step of either kind (the same in every variant), in one process with glibc's mmap threshold fixed
at 128 KiB, so that freed tensors go back to the system at once and the peak is what is alive, not how the heap
happens to be cut up. Times come from `--rounds` other processes with glibc's defaults: medians, and ratios to
fine-tuning between neighbours, since absolute times mean little on a shared machine.
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

VARIANTS = ("fine-tuning", "naive", "taps all open", "taps all open, limit", "taps CUB pattern", "full")
LIMIT = 9 << 18  # bytes of the workspace in the variant named so: a 256-channel 3x3 convolution
CUB_OPEN = (
    25,
    26,
    27,
    40,
    *range(43, 50),
    51,
    52,
)  # the authors' CUB run, 0-based convolutions in module order
CLASSES = 200


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process's resident set (VmRSS) or its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def child(variant: str, batch: int, steps: int) -> dict[str, Any]:
    """Run one variant and measure it."""
    import torch
    import torch.nn.functional as F
    import torchvision
    from torch import nn

    import taps_ext

    class Naive(nn.Module):
        """What one writes first: W + g * Delta by autograd, on every call."""

        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv = conv.requires_grad_(False)
            self.delta = nn.Parameter(torch.zeros_like(conv.weight))
            self.score = nn.Parameter(torch.tensor(0.15))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = (self.score >= 0.1).float() + self.score - self.score.detach()  # straight-through
            c = self.conv
            return F.conv2d(x, c.weight + gate * self.delta, c.bias, c.stride, c.padding, c.dilation, c.groups)

    def warm_up() -> None:
        """A tiny training step, plain and with TAPS: the code and the threads that a first step loads."""
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

    torch.manual_seed(0)
    warm_up()
    baseline = resident()
    base = torchvision.models.resnet50(weights=None)
    base_bytes = sum(p.nbytes for p in base.parameters()) + sum(b.nbytes for b in base.buffers())
    run: Any = base
    groups: Any
    if variant in ("fine-tuning", "naive"):
        base.fc = nn.Linear(2048, CLASSES)
        if variant == "naive":
            for name, module in list(base.named_modules()):
                if isinstance(module, nn.Conv2d):
                    parent, _, leaf = name.rpartition(".")
                    setattr(base.get_submodule(parent), leaf, Naive(module))
        groups = [p for p in base.parameters() if p.requires_grad]
    else:
        config = taps_ext.FullConfig() if variant == "full" else taps_ext.TapsConfig(lam=0.5)
        if "limit" in variant:
            taps_ext.set_workspace_limit(LIMIT)
        model = taps_ext.TaskModel(base, config)
        model.add_task("t", num_classes=CLASSES)
        if "CUB" in variant:
            with torch.no_grad():
                for index, (_, part) in enumerate(model.state("t").gated()):
                    part.score.fill_(0.15 if index in CUB_OPEN else 0.05)
        model.set_task("t")
        run, groups = model, model.parameter_groups(lr=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    run.train()
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, CLASSES, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(run(x), y).backward()
        optimizer.step()

    step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    peak = resident("VmHWM") - baseline
    return {"peak": peak, "seconds": statistics.median(times), "base_bytes": base_bytes}


def launch(variant: str, batch: int, steps: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run :func:`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", variant, "--batch", str(batch), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SystemExit(f"{variant}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.batch, args.steps)))
        return
    memory = {
        variant: launch(variant, args.batch, 1, {"MALLOC_MMAP_THRESHOLD_": "131072"}) for variant in args.variants
    }
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in args.variants}
    for _ in range(args.rounds):
        for variant in args.variants:
            results[variant].append(launch(variant, args.batch, args.steps, {}))
    rows = []
    for variant, runs in results.items():
        row = {"variant": variant, "peak_mib": memory[variant]["peak"] / 2**20}
        if "fine-tuning" in memory:
            extra = memory[variant]["peak"] - memory["fine-tuning"]["peak"]
            row["extra_over_base_bytes"] = extra / memory[variant]["base_bytes"]
        if runs:
            row["seconds"] = statistics.median(r["seconds"] for r in runs)
        if runs and results.get("fine-tuning"):
            pairs = zip(runs, results["fine-tuning"], strict=True)
            row["time_ratio"] = statistics.median(r["seconds"] / f["seconds"] for r, f in pairs)
        rows.append(row)
    print("| variant | peak MiB | above fine-tuning, in base sizes | step s | time ratio |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['peak_mib']:.0f} | {row.get('extra_over_base_bytes', 0):+.3f} "
            f"| {row.get('seconds', 0):.2f} | {row.get('time_ratio', 1):.3f} |"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "versions": versions(),
            "batch": args.batch,
            "rows": rows,
            "memory": memory,
            "runs": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
