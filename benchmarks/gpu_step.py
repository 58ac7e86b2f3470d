"""On a GPU: a TAPS training step with all layers open against fine-tuning: time, memory, launches.

    python benchmarks/gpu_step.py --json out.json [--quick] [--device cpu]

bf16 autocast, channels_last, SGD with momentum, fused; steps of both models in turns, medians of events. The bounds of
the project: time within 3 % of fine-tuning, memory within the base's bytes and a twentieth above it. `--device cpu`
rehearses it with small images: its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from gpu_timing import check
from torch import nn
from torch.profiler import ProfilerActivity, profile

from taps_ext import TapsConfig, TaskModel
from taps_ext.train.gradients import add_gradients

MODELS = ("resnet50", "vit_b_16")


def optimizer_of(groups: Any, device: str) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=device == "cuda")


def fine_tuning(base: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    base.train()
    optimizer = optimizer_of(base.parameters(), x.device.type)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(base(x).float(), y)
        loss.backward()
        optimizer.step()

    return step


def taps(base: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    model = TaskModel(base, TapsConfig(lam=0.5))
    model.add_task("t", num_classes=10)
    model.set_task("t")
    model.train()
    optimizer = optimizer_of(model.parameter_groups("t", lr=1e-3), x.device.type)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        add_gradients(model.sparsity_loss("t"), parameters)
        optimizer.step()

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cpu":
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def kernels(step: Callable[[], None]) -> tuple[int, dict[str, int]]:
    """How many a step launches, and those of this package by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    events = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]
    ours = Counter(e.name.split("<")[0].split("::")[-1] for e in events if "taps" in e.name)
    return len(events), dict(ours)


def row(name: str, batch: int, size: int, repeat: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    base = getattr(torchvision.models, name)(num_classes=10).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    nbytes = sum(p.nbytes for p in base.parameters())
    ways = {"fine-tuning": fine_tuning, "taps": taps}
    found: dict[str, Any] = {"model": name, "batch": batch, "base_bytes": nbytes}
    if device == "cuda":  # apart, so that neither's memory is the other's
        for way, make in ways.items():
            step = make(copy.deepcopy(base), x, y)
            for _ in range(3):
                step()
            found[f"{way}_bytes"] = peak(step)
            found[f"{way}_kernels"], own = kernels(step)
            if way == "taps":
                found["own_kernels"] = own
            del step
            torch.cuda.empty_cache()
        found["memory_over"] = (found["taps_bytes"] - found["fine-tuning_bytes"]) / nbytes
    steps = {way: make(copy.deepcopy(base), x, y) for way, make in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(repeat + 3):
        for way, step in steps.items():
            taken = seconds(step, device)
            if turn >= 3:
                times[way].append(taken)
    medians = {way: statistics.median(values) for way, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["taps"], times["fine-tuning"], strict=True))
    return {**found, "seconds": medians, "time_over_fine_tuning": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="ResNet-50 alone, few steps")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    check(parser, args.json, args.device)
    cpu = args.device == "cpu"
    rows = []
    for name in MODELS[:1] if args.quick or cpu else MODELS:
        rows.append(row(name, 2 if cpu else 64, 64 if cpu else 224, 2 if cpu else 20, args.device))
        print(json.dumps(rows[-1]), flush=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
