"""Tasks of other kinds in one batch, beside the base alone and what else there is: low rank, and Deltas in eight bits.

    python benchmarks/mixed_kinds.py [--json FILE]

ViT-S/16 at 224 pixels in fp32, without gradients, 64 images of 16 tasks. "lora": rank 8 in every linear layer of the
blocks; "int8": Deltas over 60 % of the weights, packed. All take turns; each figure is the median over the rounds of
the throughput's ratio to the base alone on the same batch, in pieces of the size that serves it best.

    ours      model(x, tasks=[...])
    layers    the same, made to go layer by layer
    c         a loop over the tasks inside each layer, on rows picked by index
    peft      its own mixed batch, model(x, adapter_names=[...]), where it is installed
    rebuilt   for each task W + scale B A by stock operations into one set of buffers, then its rows' stock forward
    unpacked  ours with the same tasks' Deltas in fp32

"c" and "peft" have no heads, which flatters them. "megabytes" is what all tasks hold beside the base.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mixed import CLASSES, PIECES, SIZE, adapted
from step_variants import base
from torch import Tensor, nn
from torch.func import functional_call
from turns import milliseconds

import taps_ext
from taps_ext import ops
from taps_ext.model import mixing
from taps_ext.parts.host import base_weight

BATCH, TASKS, RANK, ALPHA, SHARE, ROUNDS = 64, 16, 8, 16.0, 0.6, 5
MODEL = "vit_small"
Call = Callable[[], Any]
Factors = dict[str, tuple[Tensor, Tensor]]  # by layer: A [rank, K], B [N, rank]


def low_rank() -> taps_ext.TaskModel:
    """Tasks t0, t1, ... of LoRA whose B is not zero."""
    torch.manual_seed(0)
    method = taps_ext.LoraConfig(rank=RANK, alpha=ALPHA, exclude_modules=["patch_embed.*"])
    model = taps_ext.TaskModel(base(MODEL), method).eval()
    for index in range(TASKS):
        model.add_task(f"t{index}", num_classes=CLASSES)
        with torch.no_grad():
            for _, part, _ in model.state(f"t{index}").gated():
                part.change.up.normal_(std=1e-3)
    return model


def factors_of(model: taps_ext.TaskModel, name: str) -> Factors:
    return {layer: (part.change.down.detach(), part.change.up.detach()) for layer, part, _ in model.state(name).gated()}


def headless(model: taps_ext.TaskModel) -> nn.Module:
    """A plain copy of the base without its head."""
    plain: Any = copy.deepcopy(model).unload().eval()
    plain.head = nn.Identity()
    return plain


def looped(plain: nn.Module, factors: dict[str, Factors], rows: dict[str, Tensor], x: Tensor) -> Tensor:
    """One pass, in which each layer adds each task's B (A x) to its rows."""

    def added(module: nn.Module, args: Any, output: Tensor, *, layer: str) -> Tensor:
        output = output.clone()
        for name, of in factors.items():
            down, up = of[layer]
            output[rows[name]] += ALPHA / RANK * F.linear(F.linear(args[0][rows[name]], down), up)
        return output

    layers = next(iter(factors.values()))
    handles = [plain.get_submodule(layer).register_forward_hook(partial(added, layer=layer)) for layer in layers]
    try:
        found: Tensor = plain(x)
        return found
    finally:
        for handle in handles:
            handle.remove()


def rebuilt(
    model: taps_ext.TaskModel,
    plain: nn.Module,
    factors: dict[str, Factors],
    buffers: dict[str, Tensor],
    rows: dict[str, Tensor],
    x: Tensor,
) -> dict[str, Tensor]:
    found = {}
    for name, of in factors.items():
        for layer, (down, up) in of.items():
            weight = base_weight(plain.get_submodule(layer))
            torch.addmm(weight, up, down, alpha=ALPHA / RANK, out=buffers[layer])
        features = functional_call(plain, {f"{layer}.weight": buffers[layer] for layer in of}, (x[rows[name]],))
        head = model.state(name).head
        assert head is not None
        found[name] = head(features)
    return found


def of_peft(plain: nn.Module, factors: dict[str, Factors], names: Sequence[str]) -> Callable[[Tensor], Tensor] | None:
    """peft's mixed batch of the same factors; None where it is not installed."""
    try:
        import peft
    except ImportError:
        return None
    layers = list(next(iter(factors.values())))
    config = partial(peft.LoraConfig, r=RANK, lora_alpha=ALPHA, target_modules=layers)
    first, *others = factors
    adapted_by: Any = peft.get_peft_model(copy.deepcopy(plain), config(), adapter_name=first)
    for name in others:
        adapted_by.add_adapter(name, config())
    for name, of in factors.items():
        for layer, (down, up) in of.items():
            module = adapted_by.base_model.model.get_submodule(layer)
            module.lora_A[name].weight.copy_(down)
            module.lora_B[name].weight.copy_(up)
    adapted_by.eval()
    found: Callable[[Tensor], Tensor] = lambda x: adapted_by(x, adapter_names=list(names))  # noqa: E731
    return found


def by_layers(call: Call) -> None:
    mixing.forced = "layers"
    try:
        call()
    finally:
        mixing.forced = None


def held(model: taps_ext.TaskModel) -> float:
    """Megabytes of all tasks' tensors."""
    tasks = [model.state(name) for name in model.tasks]
    return sum(t.nbytes for state in tasks for t in {id(p): p for p in state.parameters()}.values()) / 1e6


def check(got: Tensor, wanted: Tensor) -> None:
    """The same products of the same rows, which kernels of fp32 round in another order."""
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-3), "what is timed does not do the same"


def measure(calls: dict[Any, Call], model: taps_ext.TaskModel, x: Tensor) -> dict[str, Any]:
    def pieces(size: int) -> None:
        for part in x.split(size):
            model(part, task=None)

    bases: dict[Any, Call] = {size: partial(pieces, size) for size in PIECES}
    calls = bases | calls
    milliseconds(calls, 1)
    found = milliseconds(calls, ROUNDS)
    best = min(bases, key=lambda size: statistics.median(found[size]))
    return {
        "base_ms": round(statistics.median(found[best]), 1),
        "pieces": best,
        "throughput": {
            key: round(statistics.median(a / b for a, b in zip(found[best], times, strict=True)), 3)
            for key, times in found.items()
            if key not in bases
        },
    }


@torch.no_grad()
def lora(x: Tensor, names: Sequence[str], rows: dict[str, Tensor]) -> dict[str, Any]:
    model = low_rank()
    factors = {name: factors_of(model, name) for name in rows}
    plain = headless(model)
    buffers = {layer: torch.empty_like(base_weight(plain.get_submodule(layer))) for layer in factors["t0"]}
    ours: Call = lambda: model(x, tasks=names)  # noqa: E731
    calls: dict[Any, Call] = {
        "ours": ours,
        "layers": partial(by_layers, ours),
        "c": partial(looped, plain, factors, rows, x),
        "rebuilt": partial(rebuilt, model, plain, factors, buffers, rows, x),
    }
    wanted = calls["rebuilt"]()
    for name, (_, made) in ours().items():
        check(made, wanted[name])
    by_peft = of_peft(plain, factors, names)
    if by_peft is not None:
        check(by_peft(x), calls["c"]())
        calls["peft"] = lambda: by_peft(x)
    return {"kind": f"lora, rank {RANK}", "megabytes": round(held(model), 1)} | measure(calls, model, x)


@torch.no_grad()
def int8(x: Tensor, names: Sequence[str]) -> dict[str, Any]:
    whole, model = (adapted(MODEL, TASKS, SHARE) for _ in range(2))
    for name in model.tasks:
        model.pack_task(name, codec="int8")
    calls: dict[Any, Call] = {
        "ours": lambda: model(x, tasks=names),
        "unpacked": lambda: whole(x, tasks=names),
    }
    megabytes = {"megabytes": round(held(model), 1), "unpacked": round(held(whole), 1)}
    return {"kind": f"int8 Deltas, {100 * SHARE:.0f} % open", **megabytes} | measure(calls, model, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the rows, as a list")
    args = parser.parse_args()
    names = [f"t{index % TASKS}" for index in range(BATCH)]
    rows = {name: torch.tensor([k for k, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}
    torch.manual_seed(1)
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    facts = {"isa": None if ops._C is None else ops._C.isa(), "torch": torch.__version__, "rounds": ROUNDS}
    found = []
    for made in (partial(lora, x, names, rows), partial(int8, x, names)):
        found.append(made() | facts)
        print(json.dumps(found[-1]), flush=True)
    if args.json is not None:
        args.json.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in found) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
