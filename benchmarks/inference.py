"""A whole model's forward with its task not merged, over the merged copy's: what it costs to keep one base for many.

    python benchmarks/inference.py --results benchmarks/results/avx2/inference.json

ResNet-50 and ViT-S/16 without gradients, one image and eight in fp32, one in bf16: the merged copy (plain classes, as
`merge_and_unload` gives them), the task with all layers open, with the pattern of training_step.py, and what one would
write without this package, `W + Delta` on every call. They take turns; medians.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from step_variants import CLASSES, MODELS, base, is_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

import taps_ext
from taps_ext.bench import keep_freed_memory
from taps_ext.bench.timing import interleaved
from taps_ext.cli.env import shareable_facts
from taps_ext.parts.host import base_weight

SIZE = 224
HEADER = """| model | images | type | merged, ms | all open | pattern | W + Delta on every call |
|---|---|---|---|---|---|---|"""


class Added(nn.Module):
    """W + Delta wherever the weight is read."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + self.delta).to(weight.dtype)


def task_model(name: str, pattern: bool) -> taps_ext.TaskModel:
    """A task whose Deltas are small and random, in evaluation mode."""
    torch.manual_seed(0)
    model = taps_ext.TaskModel(base(name), taps_ext.TapsConfig(lam=0.5))
    model.add_task("t", num_classes=CLASSES)
    with torch.no_grad():
        for index, (layer, part, _) in enumerate(model.state("t").gated()):
            assert part.change.delta is not None and part.gate.score is not None
            part.change.delta.normal_(std=1e-3)
            part.gate.score.fill_(0.15 if not pattern or is_open(name, index, layer) else 0.05)
    model.set_task("t")
    return model.eval()


def merged(model: taps_ext.TaskModel) -> nn.Module:
    return copy.deepcopy(model).merge_and_unload("t").eval()


def written_out(name: str, model: taps_ext.TaskModel) -> nn.Module:
    """The merged copy with every gated weight as a sum."""
    plain = merged(model)
    for layer, part, _ in model.state("t").gated():
        assert part.change.delta is not None
        delta = part.change.delta.detach()
        module: Any = plain.get_submodule(layer)
        module.weight = nn.Parameter(base_weight(model.base.get_submodule(layer)).detach(), requires_grad=False)
        parametrize.register_parametrization(module, "weight", Added(delta), unsafe=True)
    return plain


def measure(name: str, images: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Seconds of a forward, by variant."""
    opened, pattern = (task_model(name, kind).to(dtype) for kind in (False, True))
    models = {
        "merged": merged(opened),
        "all open": opened,
        "pattern": pattern,
        "W + Delta": written_out(name, opened),
    }
    x = torch.randn(images, 3, SIZE, SIZE).to(dtype)
    with torch.no_grad():
        wanted = models["merged"](x).float()
        for label in ("all open", "W + Delta"):  # to the rounding of the type, which every layer adds to
            error = (models[label](x).float() - wanted).abs().max() / wanted.abs().max()
            if not error < 100 * torch.finfo(dtype).eps:
                raise RuntimeError(f"{name}, {dtype}, {label}: the outputs differ by {error:.2g} of the largest")
        return interleaved({k: lambda i, m=m: m(x) for k, m in models.items()}, seconds, torch.device("cpu"))  # type: ignore[misc]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [HEADER]
    for row in rows:
        seconds = row["seconds"]
        ratios = " | ".join(f"{seconds[k] / seconds['merged']:.2f}" for k in ("all open", "pattern", "W + Delta"))
        lines.append(
            f"| {row['model']} | {row['images']} | {row['dtype']} | {1e3 * seconds['merged']:.1f} | {ratios} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    args = parser.parse_args()
    rows = []
    keep_freed_memory()
    for name in args.models:
        for images, dtype in ((1, torch.float32), (8, torch.float32), (1, torch.bfloat16)):
            seconds = measure(name, images, dtype, args.seconds)
            kind = str(dtype).removeprefix("torch.")
            rows.append({"model": name, "images": images, "dtype": kind, "seconds": seconds})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    args.results.write_text(json.dumps({"machine": shareable_facts(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
