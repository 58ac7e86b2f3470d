"""The models and variants of training_step.py, and how much arithmetic each variant cannot do without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taps_ext

CLASSES = 200
# The authors' CUB run, 0-based convolutions of a ResNet-50 in module order.
CUB_OPEN = (25, 26, 27, 40, *range(43, 50), 51, 52)
ATTENTION_BLOCKS = range(4, 12)  # of 12: their attention is 22 % of a ViT-S/16's gated weights


@dataclass(frozen=True)
class Variant:
    """`kind`: fine-tuning, naive, taps or full (a task that trains everything); `closed`: by the model's pattern."""

    kind: str
    closed: bool = False
    fraction: float = 1.0


VARIANTS = {
    "fine-tuning": Variant("fine-tuning"),
    "naive": Variant("naive"),
    "all open": Variant("taps"),
    "pattern": Variant("taps", closed=True),
    "pattern, 1/8": Variant("taps", closed=True, fraction=0.125),
    "full": Variant("full"),
}
MODELS = ("resnet50", "vit_small")


def base(name: str) -> nn.Module:
    """torchvision's ResNet-50 or timm's ViT-S/16, without pretrained weights."""
    if name == "resnet50":
        import torchvision

        return torchvision.models.resnet50(weights=None)
    import timm

    return timm.create_model("vit_small_patch16_224")


def is_open(name: str, index: int, layer: str) -> bool:
    """Whether a layer is open in the model's pattern: the CUB run's convolutions; attention of the last blocks."""
    if name == "resnet50":
        return index in CUB_OPEN
    return any(layer.startswith(f"blocks.{block}.attn.") for block in ATTENTION_BLOCKS)


class Naive(nn.Module):
    """What one writes first: W + g * Delta by autograd, on every call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros_like(self.layer.weight))
        self.score = nn.Parameter(torch.tensor(0.15))

    def forward(self, x: Tensor) -> Tensor:
        gate = (self.score >= 0.1).float() + self.score - self.score.detach()  # straight-through
        layer, weight = self.layer, self.layer.weight + gate * self.delta
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def gated_names(name: str) -> list[str]:
    """The layers that a TaskModel gates."""
    model = taps_ext.TaskModel(base(name), taps_ext.TapsConfig(lam=0.5))
    model.add_task("t", num_classes=CLASSES)
    return [row.layer for row in model.report("t").rows]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def of_role(tasks: taps_ext.TaskModel, role: str) -> list[nn.Parameter]:
    """A task's parameters of one optimizer group, in module order: in the words of every version of this package."""
    return next(group["params"] for group in tasks.parameter_groups(lr=0.0) if group["name"] == role)


def build(name: str, variant: Variant) -> tuple[Callable[[Tensor], Tensor], Any]:
    """(forward, parameters for the optimizer) of a variant in training mode."""
    model = base(name)
    head = "fc" if name == "resnet50" else "head"
    if variant.kind in ("fine-tuning", "naive"):
        wrapped = gated_names(name) if variant.kind == "naive" else []
        for layer in wrapped:
            _replace(model, layer, Naive(model.get_submodule(layer)))
        _replace(model, head, nn.Linear(model.get_submodule(head).in_features, CLASSES))  # type: ignore[arg-type]
        return model.train(), [p for p in model.parameters() if p.requires_grad]
    config: Any = taps_ext.FullConfig()
    if variant.kind == "taps":
        config = taps_ext.TapsConfig(lam=0.5, gate_fraction=variant.fraction)
    tasks = taps_ext.TaskModel(model, config)
    tasks.add_task("t", num_classes=CLASSES)
    if variant.closed:
        with torch.no_grad():
            rows = tasks.report("t").rows
            for index, (row, score) in enumerate(zip(rows, of_role(tasks, "score"), strict=True)):
                score.fill_(0.15 if is_open(name, index, row.layer) else 0.05)
    tasks.set_task("t")
    tasks.train()
    return tasks, tasks.parameter_groups(lr=0.0)


def floors(name: str, batch: int) -> dict[str, float]:
    """The operations of products that each variant needs at least, over those of fine-tuning.

    A closed layer needs its weight gradient, as many operations as its forward, for the sampled share of the batch
    alone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = base(name).train()
    forward: dict[str, int] = {}

    def note(layer: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            forward[layer] = 2 * output.numel() * (module.weight.numel() // module.weight.shape[0])

        return hook

    names = gated_names(name)
    for layer in names:
        model.get_submodule(layer).register_forward_hook(note(layer))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(batch, 3, 224, 224)).sum().backward()
    total = counter.get_total_flops()
    closed = sum(forward[layer] for index, layer in enumerate(names) if not is_open(name, index, layer))
    return {
        label: 1.0 - (closed * (1.0 - math.ceil(variant.fraction * batch) / batch) / total if variant.closed else 0.0)
        for label, variant in VARIANTS.items()
    }
