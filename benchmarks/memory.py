"""Memory: what `estimate` predicts, what `profile` counts and what the process takes, model by model.

    python benchmarks/memory.py --json benchmarks/results/memory.json

One process for each model and phase. "process" is the growth of its resident memory from after the imports to its
highest point in steps that no profiler watches; torch's allocator is told to give memory back at once, so that what is
freed does not stay resident.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

MODELS = {
    "timm:resnet50": 8,
    "timm:densenet121": 4,
    "timm:vit_small_patch16_224": 8,
    "torchvision:swin_t": 4,
    "timm:mobilenetv3_small_100": 32,
    "timm:convnext_tiny": 4,
    "timm:efficientnet_b0": 8,
}
PHASES = ("train", "infer")


def resident(which: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {which}")


def forget_peak() -> int:
    """Let "VmHWM" start from here: weights were drawn with temporaries; returns "VmRSS"."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def one(name: str, phase: str, batch: int) -> None:
    import torch
    import torch.nn.functional as F  # noqa: F401

    import taps_ext
    from taps_ext.cli.base import build_base
    from taps_ext.profiling import Machine, estimate, profile
    from taps_ext.profiling.step import Step

    torch.set_num_threads(1)
    section = {"model": name, "weights": "random"}
    build_base({"model": "timm:resnet18", "weights": "random"})(torch.randn(1, 3, 64, 64)).sum().backward()  # imports
    before = resident("VmRSS")
    model = taps_ext.TaskModel(build_base(section), taps_ext.TapsConfig(lam=0.5))
    model.add_task("t", num_classes=10)
    inputs = (torch.randn(batch, 3, 224, 224),)
    step = Step(model, inputs, "t", phase, "sgd", None)
    model.train(phase == "train")
    forget_peak()
    for _ in range(3):
        step.run()
    process = resident("VmHWM") - before
    step.optimizer = None
    for parameter in model.parameters():
        parameter.grad = None
    predicted = estimate(model, inputs, task="t", phase=phase)
    counted = profile(model, inputs, task="t", phase=phase, steps=1, machine=Machine(1e10, 1e10)).memory
    found = {"model": name, "phase": phase, "batch": batch, "process": process}
    print(json.dumps({**found, "estimate": predicted.to_dict(), "profile": counted.to_dict()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "PHASE", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], args.one[1], int(args.one[2]))
        return
    records = []
    print(
        "| model | batch | phase | estimate MiB | profile MiB | process MiB | estimate / profile | estimate / process |"
    )
    print("|---|---|---|---|---|---|---|---|")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name, batch in MODELS.items():
        for phase in PHASES:
            command = [sys.executable, __file__, "--one", name, phase, str(batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            record = json.loads(done.stdout.splitlines()[-1])
            records.append(record)
            mib = [
                count / 2**20 for count in (record["estimate"]["peak"], record["profile"]["peak"], record["process"])
            ]
            ratios = f"{mib[0] / mib[1]:.3f} | {mib[0] / mib[2]:.3f}"
            print(f"| {name} | {batch} | {phase} | {mib[0]:.1f} | {mib[1]:.1f} | {mib[2]:.1f} | {ratios} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
