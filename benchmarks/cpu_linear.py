"""Gated linear layers on the CPU: the path that is taken, and the others, over the best alternatives.

    python benchmarks/cpu_linear.py --json benchmarks/results/cpu-linear.json

All are run in turn within each repetition, on weights that take turns so that they come from memory; medians. Ratios
are to `F.linear` on a merged weight: what a task costs that has the model to itself. Beside them what the layer
would cost without this package: `torch.add` into a kept buffer and `F.linear`, and base product + Delta product.
"% of read" is W and Delta (or of the stock op the weight) over the time, as a share of the best speed at which a large
array is summed here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import taps_ext
from taps_ext import ops

LAYERS = ((4096, 4096), (3072, 768), (1024, 1024), (1000, 1003))  # outputs, inputs
ROWS = (1, 4, 7, 8, 16, 32, 37, 256)
COLD = 128 * 2**20  # bytes of weights that take turns


def medians(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Seconds: the median of `repeats` of each, in turn; no run finds what the one before it has read."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 2):
        for place, (name, run) in enumerate(runs.items()):
            start = time.perf_counter()
            run(index + 3 * place)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def read_speed() -> float:
    """Bytes a second: the best of some sums of an array that no cache holds."""
    large = torch.ones(2**26)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        large.sum()
        best = min(best, time.perf_counter() - start)
    return large.nbytes / best


def measure(outputs: int, inputs: int, rows: int, dtype: torch.dtype, repeats: int, speed: float) -> dict[str, Any]:
    """One layer's record."""
    copies = max(2, min(16, COLD // (outputs * inputs * 8)))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
    deltas = [0.01 * torch.randn(outputs, inputs) for _ in range(copies)]
    whole = [(w.float() + d).to(dtype) for w, d in zip(weights, deltas, strict=True)]
    narrow = [d.to(dtype) for d in deltas]
    x, buffer = torch.randn(rows, inputs).to(dtype), torch.empty(outputs, inputs, dtype=dtype)
    extension = ops._C
    assert extension is not None, "the extension is missing"

    def gated(i: int, path: str | None) -> Tensor:
        extension.force_path(path)
        return taps_ext.gated_linear(x, weights[i % copies], deltas[i % copies], gate=True)

    def added(i: int) -> Tensor:
        return F.linear(x, torch.add(weights[i % copies], narrow[i % copies], out=buffer))

    def twice(i: int) -> Tensor:
        return F.linear(x, weights[i % copies]) + F.linear(x, narrow[i % copies])

    runs: dict[str, Callable[[int], Any]] = {"stock": lambda i: F.linear(x, whole[i % copies])}
    extension.taken_path()
    gated(0, None)
    taken = extension.taken_path()
    runs["taken"] = lambda i: gated(i, None)
    if taken == "fused":
        runs["rebuild"] = lambda i: gated(i, "rebuild")
    runs |= {"add + linear": added, "two products": twice}
    seconds = medians(runs, repeats)
    extension.force_path(None)
    moved = weights[0].nbytes + deltas[0].nbytes
    return {
        "outputs": outputs,
        "inputs": inputs,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "path": taken,
        "seconds": seconds,
        "ratio": {name: value / seconds["stock"] for name, value in seconds.items()},
        "read": moved / seconds["taken"] / speed,
        "stock_read": weights[0].nbytes / seconds["stock"] / speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speed = read_speed()
    records = []
    print("| layer | type | rows | path | taken | rebuild | add + linear | two products | % of read | stock's |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for outputs, inputs in LAYERS:
            for dtype in (torch.float32, torch.bfloat16):
                for rows in ROWS:
                    record = measure(outputs, inputs, rows, dtype, args.repeats, speed)
                    records.append(record)
                    found = record["ratio"]
                    cells = [f"{found[n]:.2f}" if n in found else "" for n in ("taken", "rebuild")]
                    cells += [f"{found[n]:.2f}" for n in ("add + linear", "two products")]
                    shares = f"{100 * record['read']:.0f} | {100 * record['stock_read']:.0f}"
                    print(
                        f"| {outputs} x {inputs} | {record['dtype']} | {rows} | {record['path']} | "
                        f"{' | '.join(cells)} | {shares} |",
                        flush=True,
                    )
    facts = {
        "torch": torch.__version__,
        "threads": args.threads,
        "isa": ops._C.isa() if ops._C is not None else None,
        "machine": platform.processor() or platform.machine(),
        "read_bytes_per_second": speed,
    }
    if args.json is not None:
        args.json.write_text(json.dumps({"facts": facts, "records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
