"""FLOPs: what a task's forward and training step multiply, over the base's, on ten models.

    python benchmarks/flops.py --json benchmarks/results/flops.json

Counted by torch's FlopCounterMode on images of 224 x 224, with two corrections that hold for all columns alike: torch
counts a weight's gradient once for each group of a convolution, and does not know its own attention on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import taps_ext

MODELS = (
    "timm:resnet18",
    "timm:resnet50",
    "timm:mobilenetv2_100",
    "timm:efficientnet_lite0",
    "timm:densenet121",
    "timm:convnext_tiny",
    "timm:vit_small_patch16_224",
    "torchvision:swin_t",
    "timm:deit_tiny_patch16_224",
    "timm:regnety_002",
)
CLASSES = 1000  # of the base's head, and of the task's
BATCH = 8
FRACTION = 1 / 8
STEPS = ("base", "open", "closed", "sampled", "merged")
NOTE = """\
GFLOP of one image, and the others over the base's. A step is a forward, the gradient of every input but the first
layer's, and the gradient of every weight. An open layer's step is fine-tuning's: W + g * Delta and <G, Delta> are done
element by element, which counts nothing. A closed layer's score needs <G, Delta>, too: one product as large as the
weight's gradient (in convolutions that, or conv(x, Delta)). "closed, 1/8": `gate_fraction=0.125`, of one image in
eight. A merged task is a plain model.
"""


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any = None) -> int:
    transposed, mask = args[4], args[7]
    return 2 * (x if transposed else grad).numel() * weight.shape[1:].numel() * (mask[0] + mask[1])


_convolution_backward._get_raw = True  # type: ignore[attr-defined]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


CORRECTIONS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CORRECTIONS) as counter:
        run()
    return int(counter.get_total_flops())


def base(name: str) -> nn.Module:
    """Without pretrained weights."""
    library, _, model = name.partition(":")
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(model, weights=None)
    import timm

    return timm.create_model(model, pretrained=False)


def task(name: str, score: float, fraction: float = 1.0) -> taps_ext.TaskModel:
    """The model with a task whose gates are all open, or all closed."""
    config = taps_ext.TapsConfig(lam=0.5, gate_fraction=fraction)
    model = taps_ext.TaskModel(base(name).eval(), config)
    model.add_task("t", num_classes=CLASSES)
    with torch.no_grad():
        for _, part, _ in model.state("t").learned():
            part.gate.score.fill_(score)
    model.refresh_gates()
    model.set_task("t")
    return model


def forward_and_step(model: nn.Module) -> dict[str, int]:
    """Of a batch: a forward in evaluation mode, and forward and backward in training mode."""
    x = torch.randn(BATCH, 3, 224, 224)
    with torch.no_grad():
        forward = counted(lambda: model.eval()(x))
    return {"forward": forward, "step": counted(lambda: model.train()(x).sum().backward())}


def count(name: str) -> dict[str, dict[str, int]]:
    """Operations of a batch by variant."""
    return {
        "base": forward_and_step(base(name)),
        "open": forward_and_step(task(name, 0.15)),
        "closed": forward_and_step(task(name, 0.05)),
        "sampled": forward_and_step(task(name, 0.05, FRACTION)),
        "merged": forward_and_step(task(name, 0.15).merge_and_unload("t").requires_grad_(True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(NOTE)
    print("| model | forward: base | open | closed | merged | step: base | open | closed | closed, 1/8 | merged |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    models: dict[str, Any] = {}
    unlike = []
    for name in args.models:
        found = models[name] = count(name)
        cells = []
        for phase, variants in (("forward", ("base", "open", "closed", "merged")), ("step", STEPS)):
            whole = found["base"][phase]
            cells += [f"{whole / BATCH / 1e9:.3f}", *(f"{found[v][phase] / whole:.4f}" for v in variants[1:])]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        unlike += [f"{name}, {v}: forward" for v in STEPS if found[v]["forward"] != found["base"]["forward"]]
        unlike += [f"{name}, {v}: step" for v in STEPS if v != "sampled" and found[v]["step"] != found["base"]["step"]]
    if args.json is not None:
        facts = {"torch": torch.__version__, "batch": BATCH, "fraction": FRACTION, "unit": "FLOP of a batch"}
        args.json.write_text(json.dumps({**facts, "models": models}, indent=1) + "\n", encoding="utf-8")
    if unlike:
        raise SystemExit(f"expected the base's count, got another: {'; '.join(unlike)}")


if __name__ == "__main__":
    main()
