"""What a training step asks the device to do: operators by kind, TAPS beside fine-tuning, all layers open.

    python benchmarks/launches.py [--models resnet18 resnet50 vit_small] [--json FILE]

Counted by the dispatcher, on tensors of the CPU that take the road of a GPU: the weights of all layers at once, fused
optimizers. An operator that makes no kernel (views, allocations) does not count; one over a list of tensors counts
once for every 256 of ours, and once for torch's (`_foreach_`, `_fused_`). Gates' scores are read, the penalty, the
clipping of gradients and the optimizer's step are in it; nothing is timed, and no value of the step matters.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taps_ext import TapsConfig, TaskModel
from taps_ext.model import gathering
from taps_ext.model.state import _scores_of
from taps_ext.train.gradients import add_gradients

SIZES = {"resnet18": 64, "resnet50": 64, "vit_small": 224}
OWN = {"foreach_reconstruct": 1, "foreach_settle": 2}  # launches for 256 tensors
MOST = 256  # of them, as kMostTensors in csrc/kernels.h
NO_KERNEL = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "alias", "unbind")
NO_KERNEL += ("_local_scalar_dense", "lift_fresh", "is_nonzero", "_unsafe_view", "_reshape_alias", "_to_copy")


class Launches(TorchDispatchMode):
    """Operators that make kernels, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "taps_ext":
            count = OWN.get(name, 4) * -(-len(args[0]) // MOST) if name in OWN else 4
            self.found[name] += count
        elif not func.is_view and name not in NO_KERNEL:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def base_of(name: str) -> nn.Module:
    if name == "vit_small":
        import timm

        made: nn.Module = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=10)
        return made
    import torchvision

    found: nn.Module = getattr(torchvision.models, name)(num_classes=10)
    return found


def counted(step: Callable[[], None]) -> Counter[str]:
    """Of the third step: by then everything that stays is made."""
    step()
    step()
    with Launches() as launches:
        step()
    return launches.found


def optimizer_of(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=True)


def fine_tuning(base: nn.Module, x: Tensor, y: Tensor) -> Counter[str]:
    """torch alone: the whole model trains, weights and vectors in groups of their own as most recipes have them."""
    base.train()
    vectors = [p.ndim < 2 for p in base.parameters()]
    optimizer = optimizer_of(
        [
            {"params": [p for p, v in zip(base.parameters(), vectors, strict=True) if v is kind]}
            for kind in (False, True)
        ]
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(base(x), y).backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0, foreach=True)
        optimizer.step()

    return counted(step)


def taps(base: nn.Module, x: Tensor, y: Tensor) -> Counter[str]:
    """A task with the method's own settings, all of whose layers are open."""
    model = TaskModel(base, TapsConfig(lam=0.5))
    model.add_task("t", num_classes=10)
    model.set_task("t")
    model.train()
    groups = model.parameter_groups("t", lr=0.01)
    optimizer = optimizer_of([{**group} for group in groups])
    parameters = [p for group in groups for p in group["params"]]
    clipped = [p for group in groups if group["name"] != "score" for p in group["params"]]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        add_gradients(model.sparsity_loss("t"), parameters)
        nn.utils.clip_grad_norm_(clipped, 1.0, foreach=True)
        optimizer.step()
        _scores_of(model.state("t").learned())  # as `refresh` does on a GPU, where the values change at every step

    return counted(step)


def row(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    size = SIZES[name]
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    plain = fine_tuning(base_of(name), x, y)
    gathering.forced = True
    try:
        ours = taps(base_of(name), x, y)
    finally:
        gathering.forced = None
    weights = sum(ours.pop(key, 0) for key in OWN)
    more = {key: ours[key] - plain[key] for key in sorted(ours | plain) if ours[key] != plain[key]}
    return {"model": name, "fine-tuning": sum(plain.values()), "weights and settle": weights, "all else": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row(name) for name in options.models]
    print(f"{'model':<10} {'fine-tuning':>11} {'weights and settle':>18} {'all else more':>13}")
    for one in rows:
        more = one["all else"]
        print(
            f"{one['model']:<10} {one['fine-tuning']:>11} {one['weights and settle']:>18} {sum(more.values()):>13}  "
            + ", ".join(f"{key} {count:+d}" for key, count in more.items())
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
