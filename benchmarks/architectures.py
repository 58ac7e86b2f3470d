"""Every promise of TaskModel, checked on the models people have (random weights; nothing is downloaded).

    python benchmarks/architectures.py --json benchmarks/results/architectures.json [--only timm:resnet18 ...]

For each model: gated layers found and entered; every layer opened alone, with a random Delta, changes the output; all
open, in float64, every Delta's gradient equals the weight's gradient in a plain model with W + Delta (to float32, in
which gradients of Delta are kept); all closed, with NaN in every Delta, the output is the base's bit for bit; one
training step, saved, loaded into a fresh copy: outputs bit for bit; merged (beside layers that are not fused) and
unmerged again: bit for bit; unload: the state_dict is identical. The first broken promise ends the run with its name.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taps_ext
from taps_ext.model import running
from taps_ext.parts.host import weight_name

MODELS = (
    "timm:resnet18",
    "torchvision:resnet18",
    "timm:resnet50",
    "torchvision:resnet50",
    "timm:densenet121",
    "torchvision:densenet121",
    "timm:vit_small_patch16_224",
    "torchvision:vit_b_16",
    "timm:swin_tiny_patch4_window7_224",
    "torchvision:swin_t",
    "timm:mobilenetv2_100",
    "torchvision:mobilenet_v2",
    "timm:mobilenetv3_large_100",
    "torchvision:mobilenet_v3_large",
    "timm:convnext_tiny",
    "torchvision:convnext_tiny",
    "timm:efficientnet_b0",
    "timm:tf_efficientnet_b0",
    "torchvision:efficientnet_b0",
    "timm:regnety_004",
    "torchvision:regnet_y_400mf",
    "timm:vgg16_bn",
    "torchvision:vgg16_bn",
    "transformers:ViT",
    "transformers:ResNet",
)
CLASSES = 7


def build(spec: str) -> nn.Module:
    """A model with random weights; norms get statistics of their own, so that nothing is an identity by accident."""
    library, _, name = spec.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        model = importlib.import_module("timm").create_model(name)
    elif library == "transformers":
        transformers = importlib.import_module("transformers")
        model = getattr(transformers, f"{name}ForImageClassification")(getattr(transformers, f"{name}Config")())
    else:
        model = getattr(importlib.import_module("torchvision").models, name)()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.05)
                module.running_var.uniform_(0.9, 1.1)
                module.weight.uniform_(0.5, 1.5)  # a weight of 0 hides a whole block
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.uniform_(-0.1, 0.5)  # a ReLU that sleeps for every sample hides the layer behind it
        for key, parameter in model.named_parameters():
            if key.endswith(("layer_scale", "gamma")):  # as does one of 1e-6
                parameter.fill_(0.5)
    return model.eval()


def logits(output: Any) -> Tensor:
    """What a classifier returns, or the part of a transformers `ModelOutput` that it is."""
    found: Tensor = getattr(output, "logits", output)
    return found


def expect(holds: bool, promise: str) -> None:
    if not holds:
        raise SystemExit(f"broken: {promise}")


@contextmanager
def rebuilt() -> Iterator[None]:
    """No layer is fused: sums are those of the stock ops on whole weights, as they are when merged."""
    extension = taps_ext.ops._C
    if extension is not None:
        extension.force_path("rebuild")
    try:
        yield
    finally:
        if extension is not None:
            extension.force_path(None)


def adapt(base: nn.Module) -> taps_ext.TaskModel:
    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.5)).eval()
    torch.manual_seed(1)
    model.add_task("t", num_classes=CLASSES)
    return model


def entered_layers(model: taps_ext.TaskModel, x: Tensor) -> set[str]:
    """The modules that one forward of the task ran or read."""
    frames = []
    make = running.Frame
    with mock.patch.object(running, "Frame", lambda *args: frames.append(make(*args)) or frames[-1]):
        model(x, task="t")  # raises for a layer that is not entered
    return set().union(*(frame.entered for frame in frames))


@torch.no_grad()
def fill(model: taps_ext.TaskModel, scale: float = 0.1) -> None:
    """Random Deltas, each `scale` times as large as its weight on average."""
    generator = torch.Generator().manual_seed(2)
    for layer, part, _ in model.state("t").gated():
        host = model.base.get_submodule(layer)
        size = host._parameters[weight_name(host)].float().std().item() or 1.0
        part.change.delta.copy_(torch.randn(part.change.delta.shape, generator=generator) * scale * size)


@torch.no_grad()
def gates(model: taps_ext.TaskModel, opened: set[str] | None) -> None:
    for layer, part, _ in model.state("t").gated():
        part.gate.score.fill_(0.15 if opened is None or layer in opened else 0.05)


def check_each_layer_counts(model: taps_ext.TaskModel, x: Tensor) -> None:
    fill(model, 3.0)  # large enough to wake a ReLU that sleeps for every sample
    with torch.no_grad():
        gates(model, set())
        closed = logits(model(x, task="t"))
        for layer, _, _ in model.state("t").gated():
            gates(model, {layer})
            expect(not torch.equal(logits(model(x, task="t")), closed), f"{layer} opened alone changes the output")
        gates(model, None)


def check_gradients(base: nn.Module, x: Tensor) -> float:
    """The largest error of any Delta's gradient, relative to that gradient's largest element."""
    double = copy.deepcopy(base).double()
    model = adapt(copy.deepcopy(double))
    fill(model)
    gates(model, None)
    plain = copy.deepcopy(model).merge_and_unload("t").requires_grad_(True)
    x = x.double()
    target = torch.arange(len(x)) % CLASSES
    F.cross_entropy(logits(model(x, task="t")), target).backward()
    F.cross_entropy(logits(plain(x)), target).backward()
    worst = 0.0
    for layer, part, _ in model.state("t").gated():
        host = plain.get_submodule(layer)
        want = host._parameters[weight_name(host)].grad
        expect(part.change.delta.grad is not None, f"{layer}: Delta has a gradient")
        error = float((part.change.delta.grad.double() - want).abs().max() / want.abs().max())
        # Rounded once to float32, of float64 sums whose own errors are smaller by 2^-29 times their length.
        expect(error <= 2 * torch.finfo(torch.float32).eps, f"{layer}: dDelta is dW_t ({error:.2e})")
        score = float((want * part.change.delta.detach().double()).sum())
        spread = float(want.norm() * part.change.delta.detach().double().norm()) or 1.0
        off = abs(float(part.gate.score.grad) - score) / spread
        expect(off <= 2 * torch.finfo(torch.float32).eps, f"{layer}: ds is <dW_t, Delta> ({off:.2e})")
        worst = max(worst, error)
    return worst


def check_closed(base: nn.Module, model: taps_ext.TaskModel, x: Tensor) -> None:
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.fill_(float("nan"))
        gates(model, set())
        plain = copy.deepcopy(model).merge_and_unload("t")
        expect(torch.equal(logits(model(x, task="t")), logits(plain(x))), "all closed is the plain model bit for bit")
        expect(torch.equal(logits(model(x)), logits(base(x))), "no task is the base bit for bit")


def check_training(base: nn.Module, x: Tensor) -> None:
    """One step, then save, load, merge, unmerge and unload."""
    model = adapt(copy.deepcopy(base))
    fill(model, 0.02)
    model.train()
    optimizer = torch.optim.SGD(model.parameter_groups("t", lr=0.01), momentum=0.9)
    loss = F.cross_entropy(logits(model(x, task="t")), torch.arange(len(x)) % CLASSES) + model.sparsity_loss("t")
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = logits(model(x, task="t"))
        model.save_task("t", Path(folder) / "t.taps")
        fresh = taps_ext.TaskModel(copy.deepcopy(base), taps_ext.TapsConfig(lam=0.5)).eval()
        fresh.load_task(Path(folder) / "t.taps")
        expect(torch.equal(logits(fresh(x, task="t")), want), "a file loaded into a fresh copy gives the same outputs")
        with rebuilt():
            apart = logits(model(x, task="t"))
        model.merge_task("t")
        expect(torch.equal(logits(model(x, task="t")), apart), "merged, the outputs are the same")
        model.unmerge_task()
        expect(torch.equal(logits(model(x, task="t")), want), "merge, then unmerge, gives the same outputs")
        state, own = base.state_dict(), model.unload().state_dict()
        same = list(state) == list(own) and all(torch.equal(state[key], own[key]) for key in state)
        expect(same, "unload gives the base's state_dict back")


def check(spec: str) -> dict[str, Any]:
    started = time.perf_counter()
    base = build(spec)
    size = 224 if any(name in spec.lower() for name in ("swin", "vit")) else 64  # the others take any
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    model = adapt(copy.deepcopy(base))
    fill(model)
    report = model.report("t")
    entered = entered_layers(model, x)
    gated = {row.layer for row in report.rows}
    check_each_layer_counts(model, x)
    error = check_gradients(base, x)
    check_closed(base, model, x)
    check_training(base, x)
    return {
        "model": spec,
        "gated": len(gated),
        "entered": len(gated & entered),
        "bypassed": len(gated - entered),
        "weights_gated": report.gated / report.base_parameters,
        "gradient_error": error,
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    titles = ("model", "gated layers", "entered", "bypassed", "weights gated", "worst gradient error")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for spec in args.only:
        row = check(spec)
        rows.append(row)
        print(
            f"| {spec} | {row['gated']} | {row['entered']} | {row['bypassed']} | {100 * row['weights_gated']:.2f} % "
            f"| {row['gradient_error']:.1e} |",
            flush=True,
        )
    if args.json:  # rows of models that were not asked for stay
        before = json.loads(args.json.read_text()) if args.json.exists() else []
        merged = {row["model"]: row for row in [*before, *rows]}
        args.json.write_text(json.dumps([merged[m] for m in MODELS if m in merged], indent=1) + "\n")


if __name__ == "__main__":
    main()
