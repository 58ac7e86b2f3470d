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
from gpu_timing import copy_bandwidth, median_us, sets_for

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    ceiling = copy_bandwidth()
    with torch.no_grad():
        rows = [rebuild(n, dtype, ceiling) for n in (1024, 4096, 8192) for dtype in (torch.float32, torch.bfloat16)]
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    args.json.write_text(
        json.dumps({"copy_bytes_per_second": ceiling, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
