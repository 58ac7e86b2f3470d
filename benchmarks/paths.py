"""The fused path by force, beside `torch.add` into a kept buffer with the stock op: what choose()'s thresholds rest on.

    python benchmarks/paths.py

CPU only; times over the stock op on a merged weight. The machine must be quiet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taps_ext import ops
from taps_ext.bench import cases
from taps_ext.bench.timing import interleaved

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
PLAIN, LAST = torch.contiguous_format, torch.channels_last
LINEAR = {
    F32: ((4096, 4096), (3072, 768), (1152, 384), (1024, 1024), (1000, 1003), (768, 768), (384, 384), (512, 256)),
    BF16: ((3072, 768), (384, 384), (1, 768), (16, 768)),
}
ROWS = (1, 4, 8, 16, 24, 25, 32, 64, 128, 197, 256, 512, 768, 1576)
# Outputs, inputs, kernel, side, stride.
CONV2D = (
    *((256, 256, 3, 14, 1), (1024, 256, 1, 14, 1), (256, 1024, 1, 14, 1), (512, 512, 3, 14, 2), (2048, 1024, 1, 14, 2)),
    *((512, 512, 3, 7, 1), (2048, 512, 1, 7, 1), (512, 2048, 1, 7, 1), (128, 128, 3, 28, 1), (64, 64, 3, 56, 1)),
)


def forced(run: Callable[[int], Any]) -> Callable[[int], Any]:
    def call(index: int) -> Any:
        ops._C.force_path("fused")  # type: ignore[union-attr]
        try:
            return run(index)
        finally:
            ops._C.force_path(None)  # type: ignore[union-attr]

    return call


def convolution(shape: tuple[int, ...], batch: int, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Any]:
    outputs, inputs, kernel, side, stride = shape
    x = torch.randn(batch, inputs, side, side).to(dtype).contiguous(memory_format=layout)
    layer = cases._layer((outputs, inputs, kernel, kernel), dtype, CPU, layout)
    geometry = ((stride, stride), (kernel // 2, kernel // 2))

    def gated(x: Tensor, weight: Tensor, delta: Tensor, gate: bool) -> Tensor:
        return ops.gated_conv2d(x, weight, delta, None, None, *geometry, gate=gate)

    return cases._forward(gated, lambda x, weight: F.conv2d(x, weight, None, *geometry), x, layer)


def show(name: str, variants: dict[str, Any], seconds: float) -> None:
    fused = {"stock": variants["stock"], "fused": forced(variants["taps"]), "add + op": variants["add + op"]}
    with torch.no_grad():
        times = interleaved(fused, seconds, CPU)
    ratios = "  ".join(f"{key} {times[key] / times['stock']:.2f}" for key in ("fused", "add + op"))
    print(f"{name:60s} {1e3 * times['stock']:9.3f} ms  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    args = parser.parse_args()
    for dtype, shapes in LINEAR.items():
        for outputs, inputs in shapes:
            for rows in ROWS:
                name = f"linear {inputs} -> {outputs}, {rows} rows, {dtype}"
                if args.only in name:
                    show(name, cases._linear_maker(rows, outputs, inputs, dtype, CPU)(), args.seconds)
    for dtype in (F32, BF16):
        for shape in CONV2D:
            for layout in (PLAIN, LAST):
                for batch in (1, 2, 4, 8):
                    name = f"conv2d {shape[1]} -> {shape[0]}, {shape[2]}x{shape[2]} on {shape[3]} / {shape[4]}"
                    name += f", {batch} images, {layout}, {dtype}"
                    if args.only in name:
                        show(name, convolution(shape, batch, dtype, layout), args.seconds)


if __name__ == "__main__":
    main()
