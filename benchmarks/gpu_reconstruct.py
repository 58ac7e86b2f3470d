"""On a GPU: the rebuild kernel W + Delta against the measured copy bandwidth.

    python benchmarks/gpu_reconstruct.py --json out.json

Bytes are counted once for each tensor read or written; cold L2, CUDA graphs, medians. The ceiling is a device-to-device
copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from gpu_timing import check, copy_bandwidth, median_us, sets_for

from taps_ext import ops


def rebuild(n: int, dtype: torch.dtype, ceiling: float) -> dict[str, Any]:
    """W + Delta of an n x n weight: predicted from its bytes, and measured."""
    sets = sets_for(n * n * dtype.itemsize)
    weights = [torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(sets)]
    deltas = [torch.randn(n, n, device="cuda") for _ in range(sets)]
    out = [torch.empty(n, n, device="cuda", dtype=dtype) for _ in range(sets)]
    moved = weights[0].nbytes + deltas[0].nbytes + out[0].nbytes
    ours = median_us(lambda i: ops.reconstruct_(out[i], weights[i], deltas[i], gate=True), sets)
    stock = median_us(lambda i: torch.add(weights[i], deltas[i], out=out[i]), sets)
    return {
        "case": f"rebuild {n}x{n} {dtype}".replace("torch.", ""),
        "predicted_us": moved / ceiling * 1e6,
        "us": ours,
        "alternative_us": stock,
        "share_of_limit": moved / (ours / 1e6) / ceiling,
    }


def many(ceiling: float) -> dict[str, Any]:
    """The gated layers of a ViT-S/16 at once: by one call, layer by layer, and by torch's own foreach."""
    shapes = [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 12
    sets = sets_for(2 * sum(n * k for n, k in shapes))
    dtype = torch.bfloat16
    weights = [[torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes] for _ in range(sets)]
    deltas = [[torch.randn(shape, device="cuda") for shape in shapes] for _ in range(sets)]
    outs = [[torch.empty_like(weight) for weight in one] for one in weights]
    moved = sum(t.nbytes for one in (weights[0], deltas[0], outs[0]) for t in one)
    gates = [True] * len(shapes)

    def one_by_one(i: int) -> None:
        for out, weight, delta in zip(outs[i], weights[i], deltas[i], strict=True):
            ops.reconstruct_(out, weight, delta, gate=True)

    def of_torch(i: int) -> None:
        torch._foreach_copy_(outs[i], weights[i])
        torch._foreach_add_(outs[i], deltas[i])

    ours = median_us(lambda i: ops.foreach_reconstruct_(outs[i], weights[i], deltas[i], gates=gates), sets)
    return {
        "case": "rebuild of 48 layers, ViT-S/16, bfloat16",
        "predicted_us": moved / ceiling * 1e6,
        "us": ours,
        "one_by_one_us": median_us(one_by_one, sets),
        "alternative_us": median_us(of_torch, sets),
        "share_of_limit": moved / (ours / 1e6) / ceiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    check(parser, args.json)
    ceiling = copy_bandwidth()
    with torch.no_grad():
        rows = [rebuild(n, dtype, ceiling) for n in (1024, 4096, 8192) for dtype in (torch.float32, torch.bfloat16)]
        rows.append(many(ceiling))
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    args.json.write_text(
        json.dumps({"copy_bytes_per_second": ceiling, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
