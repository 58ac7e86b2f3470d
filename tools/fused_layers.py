"""Which layers of a network are fused on CUDA, by the rules of csrc/core/choose.h; no GPU is needed.

    python tools/fused_layers.py timm:resnet50 [--batch 1 8 32] [--shape 3,224,224] [--names]

Of a task whose layers are all open, in bf16 or fp16, unmerged, without gradients, images and weights in channels_last
(docs/gpu.md).
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from taps_ext import _C, TapsConfig, TaskModel
from taps_ext.cli.base import build_base

MOST_PLACES = 64
DEPTHWISE = {(3, 3): (1, 2), (5, 5): (1, 2), (7, 7): (1,)}  # kernels -> strides


class Fused(NamedTuple):
    """The gated layers of a network, and those that are fused."""

    layers: list[str]
    fused: list[str]


def _fits(module: Any, plain: bool) -> bool:
    """Whether the kernels know a layer's form."""
    if isinstance(module, nn.Linear):
        return module.in_features % 2 == 0
    if module.groups == 1:
        return module.in_channels % (2 if plain else 8) == 0 and math.prod(module.kernel_size) <= MOST_PLACES
    strides = DEPTHWISE.get(module.kernel_size, ())
    alike = module.groups == module.in_channels == module.out_channels and module.dilation == (1, 1)
    return alike and all(stride in strides for stride in module.stride)


def fused_layers(name: str, batch: int, shape: tuple[int, ...] = (3, 224, 224)) -> Fused:
    """Of a network by name (as `taps profile` takes it) on a batch."""
    base = build_base({"model": name, **({} if name.startswith("python:") else {"weights": "random"})})
    model = TaskModel(base, TapsConfig(lam=1.0))
    model.add_task("task")
    layers = [layer for layer, _, _ in model.state("task").gated()]
    base = model.unload().to("meta").eval()
    found = Fused(layers, [])

    def note(layer: str, module: Any) -> None:
        def hook(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            outputs, depth = module.weight.shape[0], module.weight[0].numel()
            convolution = isinstance(module, nn.Conv2d)
            depthwise = convolution and module.groups > 1
            plain = convolution and depth == module.in_channels and module.stride == (1, 1) and module.padding == (0, 0)
            path = _C.choose(
                open=True,
                cuda=True,
                narrow=True,
                fusable=_fits(module, plain),
                depthwise=depthwise,
                rows=output.numel() // outputs,
                outputs=outputs,
                inputs=depth,
                places=math.prod(module.kernel_size) if convolution else 0,
            )
            if path == "fused":
                found.fused.append(layer)

        module.register_forward_hook(hook)

    for layer in layers:
        module = base.get_submodule(layer)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            note(layer, module)
    base(torch.empty(batch, *shape, device="meta"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--shape", default="3,224,224")
    parser.add_argument("--names", action="store_true", help="print the layers, too")
    args = parser.parse_args()
    for batch in args.batch:
        found = fused_layers(args.model, batch, tuple(map(int, args.shape.split(","))))
        print(f"{args.model}, batch {batch}: {len(found.fused)} of {len(found.layers)} layers fused")
        for name in found.fused if args.names else ():
            print(f"    {name}")


if __name__ == "__main__":
    main()
