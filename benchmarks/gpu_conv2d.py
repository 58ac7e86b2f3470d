"""On a GPU: the fused forward of convolutions against the rebuild and cuDNN; where it crosses over.

    python benchmarks/gpu_conv2d.py --json out.json [--quick]

bf16, channels_last, cold L2, CUDA graphs, medians. Convolutions of ResNet-50 (dense) and of MobileNetV2 (depthwise) at
several numbers of images; each with both paths, with torch's add into a kept buffer and its convolution, and with a
merged copy. The dense ones say which bound of the rule "shallow" of docs/choose.md holds, the depthwise ones whether
cuDNN is as good as benchmarks/predicted.py takes it to be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import check, copy_bandwidth, median_us, sets_for
from torch import Tensor

from taps_ext import gated_conv2d, ops

BF16, LAST = torch.bfloat16, torch.channels_last
# Channels in, out, kernel, stride, side of the input; groups are 1, or where out is 0 as many as channels.
DENSE = [(2048, 512, 1, 1, 7), (512, 512, 3, 1, 7), (512, 2048, 1, 1, 7), (256, 1024, 1, 1, 14), (256, 256, 3, 1, 14)]
DENSE += [(512, 1024, 1, 2, 28), (128, 128, 3, 1, 28), (64, 256, 1, 1, 56), (64, 64, 3, 1, 56)]
DEPTHWISE = [(32, 0, 3, 1, 112), (96, 0, 3, 2, 112), (192, 0, 3, 1, 28), (576, 0, 3, 2, 14), (960, 0, 3, 1, 7)]


class Layer:
    """Operands of one convolution, as many sets as keep the cache cold."""

    def __init__(self, shape: tuple[int, int, int, int, int], images: int, delta: torch.dtype) -> None:
        inputs, outputs, kernel, self.stride, side = shape
        self.groups = inputs if outputs == 0 else 1
        self.padding = kernel // 2
        of_weight = (outputs or inputs, inputs // self.groups, kernel, kernel)

        def draw(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
            return torch.randn(sizes, device="cuda", dtype=dtype).to(memory_format=LAST)

        one = draw(images, inputs, side, side)
        nbytes = one.nbytes + 2 * torch.Size(of_weight).numel()
        self.sets = sets_for(nbytes)
        self.x = [one, *(draw(images, inputs, side, side) for _ in range(self.sets - 1))]
        self.weights = [draw(*of_weight) for _ in range(self.sets)]
        self.deltas = [draw(*of_weight, dtype=delta) for _ in range(self.sets)]
        self.buffers = [torch.empty_like(weight) for weight in self.weights]

    def stock(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)

    def gated(self, i: int) -> Tensor:
        operands = self.x[i], self.weights[i], self.deltas[i], None, None
        return gated_conv2d(*operands, self.stride, self.padding, 1, self.groups, gate=True)

    def forced(self, path: str, call: Callable[[int], Any]) -> float | None:
        assert ops._C is not None
        ops._C.force_path(path)
        try:
            return median_us(call, self.sets)
        except RuntimeError as error:  # a path that does not know the layer
            if "is forced, but" not in str(error):
                raise
            return None
        finally:
            ops._C.force_path(None)


def measured(shape: tuple[int, int, int, int, int], images: int, delta: torch.dtype, copy: float) -> dict[str, Any]:
    layer = Layer(shape, images, delta)
    result = layer.stock(layer.x[0], layer.weights[0])
    moved = layer.x[0].nbytes + layer.weights[0].nbytes + layer.deltas[0].nbytes + result.nbytes

    def add_then(i: int) -> Tensor:
        return layer.stock(layer.x[i], torch.add(layer.weights[i], layer.deltas[i], out=layer.buffers[i]))

    chosen = median_us(layer.gated, layer.sets)
    other = median_us(add_then, layer.sets)
    return {
        "layer": shape,
        "images": images,
        "delta": str(delta).removeprefix("torch."),
        "us": chosen,
        "paths_us": {path: layer.forced(path, layer.gated) for path in ("fused", "rebuild")},
        "limit_us": 1e6 * moved / copy,
        "alternative_us": other,
        "speedup_over_best": other / chosen,
        "merged_us": median_us(lambda i: layer.stock(layer.x[i], layer.weights[i]), layer.sets),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="two layers at one image, to see that everything runs")
    args = parser.parse_args()
    check(parser, args.json)
    torch.backends.cudnn.benchmark = True
    copy = copy_bandwidth()
    cases = [(shape, images, BF16) for images in (1, 8) for shape in DENSE]
    cases += [(shape, 1, torch.float32) for shape in DENSE]
    cases += [(shape, images, BF16) for images in (1, 8, 64) for shape in DEPTHWISE]
    if args.quick:
        cases = [(DENSE[1], 1, BF16), (DEPTHWISE[-1], 1, BF16)]
    report: dict[str, Any] = {"copy_bytes_per_second": copy, "rows": []}
    for case in cases:
        with torch.no_grad():
            row = measured(*case, copy)
        report["rows"].append(row)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(
            f"{row['layer']} x {row['images']} {row['delta']}: {row['us']:.1f} us, paths {row['paths_us']}", flush=True
        )


if __name__ == "__main__":
    main()
