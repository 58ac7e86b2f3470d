"""Latency of the engine at 80 % of what it can do, with requests that come when they come, beside the base alone.

    python benchmarks/serving.py [--model timm:resnet18] [--size 64] [--tasks 16] [--share 0.25] [--seconds 20]

The same engine answers, in turns, for the base (every request is the base's) and for many tasks (each request is one's,
drawn alike). First what it can do is measured: 256 requests are always there. Then arrivals are drawn at 80 % of that
from a Poisson process that waits for no answer, so that a request counts as late as it is behind others; refused ones
count, too. Prints JSON: of each round answers a second, p50 and p99 in milliseconds, and at the end the microseconds
that switching the active task takes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taps_ext import TapsConfig, TaskFolder, TaskModel
from taps_ext.cli.base import build_base
from taps_ext.serve import Engine, QueueFullError

OUTSTANDING = 256


def make_folder(path: Path, base: dict[str, Any], tasks: int, share: float) -> TaskFolder:
    """Files of tasks, each with its own share of the layers open, in random values."""
    folder = TaskFolder(path / "folder", create=True)
    model = TaskModel(build_base(base), TapsConfig(lam=0.1)).eval()
    for i in range(tasks):
        name = f"t{i}"
        model.add_task(name, num_classes=10)
        layers = [row.layer for row in model.report(name).rows]
        opened = set(random.Random(i).sample(layers, max(round(share * len(layers)), 1)))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for layer, part, gate in model.state(name).gated():
                assert gate.score is not None
                gate.score.fill_(0.2 if layer in opened else 0.0)
                for change in part.changes() if layer in opened else ():
                    change.add_(torch.randn(change.shape, generator=generator) * 0.01)
        model.save_task(name, path / "made.taps")
        folder.add(path / "made.taps")
        model.delete_task(name)
    return folder


def saturation(engine: Engine, sample: Tensor, names: list[str | None], seconds: float) -> float:
    """Answers a second while there are always requests to answer."""
    slots, draw, done = threading.Semaphore(OUTSTANDING), random.Random(1), [0]
    lock = threading.Lock()

    def finished(future: Future[Any]) -> None:
        future.result()
        with lock:
            done[0] += 1
        slots.release()

    def ask(until: float) -> None:
        while time.perf_counter() < until:
            slots.acquire()
            engine.submit(sample, draw.choice(names)).add_done_callback(finished)

    ask(time.perf_counter() + seconds / 4)  # warm
    begin, before = time.perf_counter(), done[0]
    ask(begin + seconds)
    rate = (done[0] - before) / (time.perf_counter() - begin)
    for _ in range(OUTSTANDING):
        slots.acquire()
    return rate


def arrivals(engine: Engine, sample: Tensor, names: list[str | None], rate: float, seconds: float) -> dict[str, Any]:
    """Latencies of requests that come at a rate, whatever becomes of those before."""
    draw, latencies, refused = random.Random(2), list[float](), 0
    begin = due = time.perf_counter()
    before, waiting = engine.stats(), list[Future[Any]]()
    while due < begin + seconds:
        due += draw.expovariate(rate)
        time.sleep(max(due - time.perf_counter(), 0))
        try:
            future = engine.submit(sample, draw.choice(names))
        except QueueFullError:
            refused += 1
            continue
        # From when it was due: what this loop is late by is a wait, too.
        future.add_done_callback(lambda _, due=due: latencies.append(time.perf_counter() - due))
        waiting.append(future)
    for future in waiting:
        future.result()
    stats, cuts = engine.stats(), statistics.quantiles(latencies, n=100)
    batches = stats["batches"] - before["batches"]
    return {
        "rate": rate,
        "answers": len(latencies),
        "refused": refused,
        "p50_ms": 1e3 * cuts[49],
        "p99_ms": 1e3 * cuts[98],
        "samples_per_batch": len(latencies) / max(batches, 1),
    }


def switching(model: TaskModel, names: list[str]) -> float:
    """Median microseconds of set_task."""
    taken = []
    for i in range(2000):
        begin = time.perf_counter()
        model.set_task(names[i % len(names)])
        taken.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:resnet18")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.25, help="of the layers that are open")
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--max-delay", type=float, default=0.005)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = {"model": args.model, "weights": "random"}
    sample = torch.randn(3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    rounds = []
    with tempfile.TemporaryDirectory() as path:
        folder = make_folder(Path(path), base, args.tasks, args.share)
        model = TaskModel(build_base(base)).eval()
        settings = {"max_batch": args.max_batch, "max_delay": args.max_delay, "sample": sample, "pin": list(folder)}
        with Engine(model, folder, **settings) as engine:
            for _ in range(args.rounds):
                found: dict[str, Any] = {}
                kinds: dict[str, list[str | None]] = {"base": [None], "tasks": list(folder)}
                for kind, names in kinds.items():
                    most = saturation(engine, sample, names, args.seconds)
                    found[kind] = {"saturation": most, **arrivals(engine, sample, names, 0.8 * most, args.seconds)}
                found["saturation_over_base"] = found["tasks"]["saturation"] / found["base"]["saturation"]
                rounds.append(found)
        names = [model.load_task(folder.file(name)) for name in list(folder)[:4]]
        switch = switching(model, names)
    print(json.dumps({**vars(args), "rounds": rounds, "switch_us": switch}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
