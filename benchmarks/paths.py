"""Both paths of open layers by force, over the stock op on a merged weight: what choose()'s thresholds rest on.

    python benchmarks/paths.py [--isa avx2] [--only bfloat16]

CPU only, without gradients. The machine must be quiet. With `ONEDNN_MAX_CPU_ISA=AVX512_CORE` and `--isa avx512` a
machine with AVX-512 BF16 is one without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from taps_ext import ops
from taps_ext.bench import keep_freed_memory
from taps_ext.bench.cases import Variant, conv2d_maker, linear_maker
from taps_ext.bench.timing import interleaved

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
ROWS = (1, 2, 4, 8, 16, 24, 25, 32, 64, 128, 197, 256, 512, 768, 1576)
# Outputs, inputs; the last ones for the least that is worth it.
LINEAR = (
    *((4096, 4096), (3072, 768), (1152, 384), (1024, 1024), (1000, 1003), (768, 768), (384, 384), (512, 256)),
    *((128, 128), (64, 64), (16, 768), (1, 768)),
)
# Outputs, inputs, kernel, side, stride.
CONV2D = (
    *((256, 256, 3, 14, 1), (1024, 256, 1, 14, 1), (256, 1024, 1, 14, 1), (512, 512, 3, 14, 2), (2048, 1024, 1, 14, 2)),
    *((256, 256, 3, 7, 1), (256, 256, 3, 10, 1), (256, 256, 3, 16, 1), (512, 512, 3, 16, 1)),
    *((512, 512, 3, 7, 1), (2048, 512, 1, 7, 1), (512, 2048, 1, 7, 1), (128, 128, 3, 28, 1), (64, 64, 3, 56, 1)),
)
BATCHES = (1, 2, 4, 8)


def forced(run: Variant, path: str) -> Variant:
    def call(index: int) -> Any:
        ops._C.force_path(path)  # type: ignore[union-attr]
        try:
            return run(index)
        finally:
            ops._C.force_path(None)  # type: ignore[union-attr]

    return call


def show(name: str, make: Callable[[], dict[str, Variant]], seconds: float) -> None:
    variants = make()
    compared = {"stock": variants["stock"], "add + op": variants["add + op"]}
    compared |= {path: forced(variants["taps"], path) for path in ("fused", "rebuild")}
    with torch.no_grad():
        times = interleaved(compared, seconds, CPU)
    ratios = "  ".join(f"{key} {times[key] / times['stock']:.2f}" for key in ("fused", "rebuild", "add + op"))
    print(f"{name:55s} {1e3 * times['stock']:9.3f} ms  {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    parser.add_argument("--isa", help="of the kernels; the best one otherwise")
    args = parser.parse_args()
    ops._C.force_isa(args.isa)  # type: ignore[union-attr]
    keep_freed_memory()
    lines: dict[str, Callable[[], dict[str, Variant]]] = {}
    for dtype, delta in ((F32, F32), (BF16, F32), (BF16, BF16)):
        kind = f"{dtype}{' and Delta' if delta == BF16 else ''}".replace("torch.", "")
        for outputs, inputs in LINEAR:
            for rows in ROWS:
                name = f"linear {inputs} -> {outputs}, {rows} rows, {kind}"
                lines[name] = linear_maker(rows, outputs, inputs, dtype, delta, CPU)
    for dtype in (F32, BF16):
        for shape in CONV2D:
            for last in (False, True):
                for batch in BATCHES:
                    name = f"conv2d {shape[1]} -> {shape[0]}, {shape[2]}x{shape[2]} on {shape[3]} / {shape[4]}, {batch}"
                    name += f"{', channels_last' * last}, {dtype}".replace("torch.", "")
                    lines[name] = conv2d_maker(batch, *shape, last, dtype, CPU)
    for name, make in lines.items():
        if args.only in name:
            show(name, make, args.seconds)


if __name__ == "__main__":
    main()
