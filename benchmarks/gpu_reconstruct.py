"""On a GPU: the rebuild kernel against the measured copy bandwidth, and gated_linear against its alternatives.

    python benchmarks/gpu_reconstruct.py --json out.json

Bytes are counted once for each tensor read or written. Buffers rotate so that nothing is in L2; times are medians of
CUDA-event timings. The ceiling is a device-to-device copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from taps_ext import gated_linear, ops


def median_ms(run: Callable[[int], Any], repeat: int = 50) -> float:
    """Median milliseconds of `run(i)` over rotating buffers."""
    for i in range(5):
        run(i)
    times = []
    for i in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a 2 GiB copy."""
    a = torch.randn(2**29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (median_ms(lambda i: b.copy_(a), 20) / 1e3)


def rebuild(n: int, dtype: torch.dtype, ceiling: float) -> dict[str, Any]:
    """W + Delta of an n x n weight: predicted from its bytes, and measured."""
    sets = max(2, 2**28 // (n * n * 8))
    weights = [torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(sets)]
    deltas = [torch.randn(n, n, device="cuda") for _ in range(sets)]
    out = torch.empty(n, n, device="cuda", dtype=dtype)
    moved = weights[0].nbytes + deltas[0].nbytes + out.nbytes
    ours = median_ms(lambda i: ops.reconstruct_(out, weights[i % sets], deltas[i % sets], gate=True))
    stock = median_ms(lambda i: torch.add(weights[i % sets], deltas[i % sets].to(dtype), out=out))
    return {
        "case": f"rebuild {n}x{n} {dtype}".replace("torch.", ""),
        "predicted_ms": moved / ceiling * 1e3,
        "ms": ours,
        "best_alternative_ms": stock,
        "share_of_limit": moved / (ours / 1e3) / ceiling,
    }


def linear(rows: int, k: int, n: int, ceiling: float) -> dict[str, Any]:
    """bf16 gated_linear, open, against add(out=) + F.linear, base + delta product, and the merged layer."""
    sets = max(2, 2**28 // (k * n * 4))
    bf16 = torch.bfloat16
    x = torch.randn(rows, k, device="cuda", dtype=bf16)
    weights = [torch.randn(n, k, device="cuda", dtype=bf16) for _ in range(sets)]
    deltas = [torch.randn(n, k, device="cuda", dtype=bf16) for _ in range(sets)]
    buffer = torch.empty_like(weights[0])

    def add_then(i: int) -> torch.Tensor:
        return F.linear(x, torch.add(weights[i % sets], deltas[i % sets], out=buffer))

    def two_products(i: int) -> torch.Tensor:
        return torch.addmm(F.linear(x, weights[i % sets]), x, deltas[i % sets].t())

    with torch.no_grad():
        ours = median_ms(lambda i: gated_linear(x, weights[i % sets], deltas[i % sets], gate=True))
        closed = median_ms(lambda i: gated_linear(x, weights[i % sets], deltas[i % sets], gate=False))
        others = {"add + linear": median_ms(add_then), "two products": median_ms(two_products)}
        merged = median_ms(lambda i: F.linear(x, weights[i % sets]))
    best = min(others.values())
    return {
        "case": f"linear M={rows} K={k} N={n} bf16",
        "predicted_ms": 4 * 2 * n * k / ceiling * 1e3,  # W, Delta, W_t written and read
        "ms": ours,
        "best_alternative_ms": best,
        "speedup": best / ours,
        "merged_ms": merged,
        "closed_over_merged": closed / merged,
        "alternatives": others,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    ceiling = copy_bandwidth()
    rows = [rebuild(n, dtype, ceiling) for n in (1024, 4096, 8192) for dtype in (torch.float32, torch.bfloat16)]
    rows += [linear(m, 4096, 4096, ceiling) for m in (1, 16, 64, 1024, 8192)]
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    args.json.write_text(json.dumps({"copy_bytes_per_second": ceiling, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
