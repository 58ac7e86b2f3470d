"""Batches of several tasks beside the base alone and beside what else one would write, in one run.

    python benchmarks/mixed.py --results benchmarks/results/avx2/mixed.jsonl

ResNet-50 and ViT-S/16 at 224 pixels in fp32, without gradients. Each task has its own head and its own random choice of
open layers, which hold a share of the gated weights. All take turns; each figure is the median of the ratios in a round
to (a), the base alone on the same batch in pieces of the size that serves it best.

    ours   model(x, tasks=[...])
    layers the same made to go layer by layer, where a CPU goes task by task
    b      merged copies, one after another (each takes as much memory as a task with every weight open)
    c      a loop over the tasks inside each layer, on its rows picked by a mask, as peft does it
    d      W + Delta made anew for each task in each layer, stock products
    e      the base's product once, and one grouped product of the Deltas (torch._grouped_mm; linear layers alone)
    f      for each task one foreach addition into one set of buffers, then the stock forward of its rows

Rows that are there are not measured again; `--table` prints them.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step_variants import base
from torch import Tensor, nn
from torch.func import functional_call
from turns import milliseconds

import taps_ext
from taps_ext import ops
from taps_ext.model import mixing
from taps_ext.parts.host import base_weight

SIZE, CLASSES, PIECES = 224, 100, (4, 8, 16, 64)
CASES = [
    (model, batch, tasks, share)
    for model in ("vit_small", "resnet50")
    for batch, counts in ((64, (16, 64, 4, 8, 2, 1)), (16, (16, 4)))
    for tasks in counts
    for share in (0.6, 0.25)
]


def adapted(name: str, tasks: int, share: float) -> taps_ext.TaskModel:
    torch.manual_seed(0)
    draw = random.Random(0)
    model = taps_ext.TaskModel(base(name), taps_ext.TapsConfig(lam=1.0)).eval()
    for index in range(tasks):
        model.add_task(f"t{index}", num_classes=CLASSES)
        state = model.state(f"t{index}")
        sizes = {layer: gate.size for layer, _, gate in state.gated()}
        opened, left = [], share * sum(sizes.values())
        for layer in draw.sample(list(sizes), len(sizes)):
            if sizes[layer] <= left:
                opened.append(layer)
                left -= sizes[layer]
        with torch.no_grad():
            for layer, part, _ in state.gated():
                if layer in opened:
                    part.change.delta.normal_(std=1e-3)
                else:
                    part.change.delta = None  # as a loaded task has it: a closed layer takes no memory
                    part.change.owed = True
        model.set_gates(f"t{index}", open=opened)
    return model


class Alone:
    """What others would write: plain functions of a plain copy of the base and of the tasks' tensors."""

    def __init__(self, model: taps_ext.TaskModel, names: Sequence[str]) -> None:
        self.rows = {name: torch.tensor([k for k, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)}
        self.plain = copy.deepcopy(model).unload().eval()
        self.head = model.state(names[0]).head_path
        self.deltas: dict[str, dict[str, Tensor]] = {}
        self.norms: dict[str, dict[str, Tensor]] = {}
        self.heads: dict[str, nn.Module] = {}
        for name in self.rows:
            state = model.state(name)
            self.deltas[name] = {layer: part.change.delta.detach() for layer, part, gate in state.gated() if gate.known}
            self.heads[name] = state.head
            self.norms[name] = {
                f"{layer}.{key}": value.detach()
                for layer, part in state.table.items()
                if part.gate is None and layer != self.head
                for key, value in part.values(None).items()
            }
        modules = dict(self.plain.named_modules())
        self.weights = {layer: base_weight(modules[layer]) for found in self.deltas.values() for layer in found}
        self.stacked: dict[nn.Module, Tensor] = {}
        self.buffers = {layer: torch.empty_like(weight) for layer, weight in self.weights.items()}

    def _run(self, name: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        head = {f"{self.head}.{key}": value for key, value in self.heads[name].named_parameters()}
        given = {f"{layer}.weight": weight for layer, weight in weights.items()}
        return functional_call(self.plain, {**given, **self.norms[name], **head}, (x,))

    def foreach(self, x: Tensor) -> list[Tensor]:
        found = []
        for name, rows in self.rows.items():
            layers = list(self.deltas[name])
            buffers = [self.buffers[layer] for layer in layers]
            torch._foreach_copy_(buffers, [self.weights[layer] for layer in layers])
            torch._foreach_add_(buffers, [self.deltas[name][layer] for layer in layers])
            found.append(self._run(name, dict(zip(layers, buffers, strict=True)), x[rows]))
        return found

    def rebuilt(self, x: Tensor) -> list[Tensor]:
        """W + Delta as each layer is reached."""
        found = []
        for name, rows in self.rows.items():
            handles = []
            for layer, delta in self.deltas[name].items():
                module = self.plain.get_submodule(layer)

                def added(module: Any, args: Any, delta: Tensor = delta) -> None:
                    module.kept = module._parameters["weight"]
                    module._parameters["weight"] = module.kept + delta

                def restored(module: Any, args: Any, output: Any) -> None:
                    module._parameters["weight"] = module.kept

                handles += [module.register_forward_pre_hook(added), module.register_forward_hook(restored)]
            found.append(self._run(name, {}, x[rows]))
            for handle in handles:
                handle.remove()
        return found

    def merged(self, x: Tensor, copies: dict[str, nn.Module]) -> list[Tensor]:
        return [copies[name](x[rows]) for name, rows in self.rows.items()]

    def copies(self) -> dict[str, nn.Module]:
        found = {}
        for name in self.rows:
            made = copy.deepcopy(self.plain)
            for layer, delta in self.deltas[name].items():
                base_weight(made.get_submodule(layer)).data.add_(delta)
            state = dict(made.named_parameters()) | dict(made.named_buffers())
            for key, value in self.norms[name].items():
                state[key].data.copy_(value)
            parent, _, key = self.head.rpartition(".")
            setattr(made.get_submodule(parent), key, self.heads[name])
            found[name] = made
        return found

    def within(self, x: Tensor, layer_product: Callable[..., Tensor]) -> Tensor:
        """One pass, in which each layer adds the tasks' products to the base's. Norms are the base's here, and the head
        one for all: less than is asked for, which flatters it."""
        handles = []
        for layer in self.weights:
            module = self.plain.get_submodule(layer)
            deltas = {name: found[layer] for name, found in self.deltas.items() if layer in found}

            def added(module: Any, args: Any, output: Tensor, deltas: Any = deltas) -> Tensor:
                return layer_product(self, module, args[0], output, deltas)

            handles.append(module.register_forward_hook(added))
        try:
            return self.plain(x)
        finally:
            for handle in handles:
                handle.remove()


def masked(alone: Alone, module: Any, input: Tensor, output: Tensor, deltas: dict[str, Tensor]) -> Tensor:
    """As peft: rows picked by index, their product put back."""
    output = output.clone()
    for name, delta in deltas.items():
        rows = alone.rows[name]
        picked = input[rows]
        if isinstance(module, nn.Linear):
            output[rows] += F.linear(picked, delta)
        else:
            shape = (module.stride, module.padding, module.dilation, module.groups)
            output[rows] += F.conv2d(picked, delta, None, *shape)
    return output


def grouped(alone: Alone, module: Any, input: Tensor, output: Tensor, deltas: dict[str, Tensor]) -> Tensor:
    """Samples of the tasks that are open here side by side, one grouped product; the one convolution as peft does."""
    if not isinstance(module, nn.Linear):
        return masked(alone, module, input, output, deltas)
    rows = torch.cat([alone.rows[name] for name in deltas])
    counts = torch.tensor([len(alone.rows[name]) for name in deltas])
    each = input[0].numel() // input.shape[-1]
    picked = input[rows].flatten(0, -2)
    if module not in alone.stacked:  # once: it takes as much memory again
        alone.stacked[module] = torch.stack(list(deltas.values())).transpose(1, 2)
    ends = (counts.cumsum(0) * each).to(torch.int32)
    made = torch._grouped_mm(picked, alone.stacked[module], offs=ends)
    return output.index_add(0, rows, made.view(len(rows), *output.shape[1:]))


@torch.no_grad()
def measure(name: str, batch: int, tasks: int, share: float, rounds: int) -> dict[str, Any]:
    model = adapted(name, tasks, share)
    names = [f"t{index % tasks}" for index in range(batch)]
    torch.manual_seed(1)
    x = torch.randn(batch, 3, SIZE, SIZE)
    alone = Alone(model, names)

    def pieces(size: int) -> None:
        for part in x.split(size):
            model(part, task=None)

    def by_layers() -> None:
        mixing.forced = "layers"
        try:
            model(x, tasks=names)
        finally:
            mixing.forced = None

    bases = {size: (lambda size=size: pieces(size)) for size in PIECES if size <= batch}
    calls: dict[Any, Callable[[], object]] = dict(bases)
    calls["ours"] = lambda: model(x, tasks=names)
    calls["layers"] = by_layers
    if tasks <= 4:  # else they take more memory by far
        copies = alone.copies()
        calls["b"] = lambda: alone.merged(x, copies)
    calls["c"] = lambda: alone.within(x, masked)
    calls["d"] = lambda: alone.rebuilt(x)
    if name == "vit_small":
        calls["e"] = lambda: alone.within(x, grouped)
    calls["f"] = lambda: alone.foreach(x)
    wanted = alone.foreach(x)
    got = model(x, tasks=names)
    for (_, (_, one)), other in zip(got.items(), wanted, strict=True):
        # The same products of the same rows, which kernels of fp32 round in another order.
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3), "what is timed does not do the same"
    milliseconds(calls, 1)
    found = milliseconds(calls, rounds)
    best = min(bases, key=lambda size: statistics.median(found[size]))
    ratios = {
        key: round(statistics.median(a / b for a, b in zip(found[best], times, strict=True)), 3)
        for key, times in found.items()
        if key not in bases
    }
    whole = {str(size): round(statistics.median(found[size]), 1) for size in bases}
    return {"model": name, "batch": batch, "tasks": tasks, "share": share, "road": got.road, "pieces": best} | {
        "base_ms": whole,
        "throughput": ratios,
        "rounds": rounds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| model | batch | tasks | open | base's pieces | ours | layers | b | c | d | e | f |", "|---" * 12 + "|"]
    for row in rows:
        cells = [
            f"{row['throughput'][key]:.2f}" if key in row["throughput"] else "" for key in ("ours", "layers", *"bcdef")
        ]
        facts = [row["model"], row["batch"], row["tasks"], f"{100 * row['share']:.0f} %", row["pieces"], *cells]
        lines.append("| " + " | ".join(map(str, facts)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=int, help="so many cases, the first that are missing")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.table:
        print(table(rows))
        return
    known = {(row["model"], row["batch"], row["tasks"], row["share"]) for row in rows}
    missing = [case for case in CASES if case not in known][: args.only]
    isa = None if ops._C is None else ops._C.isa()
    for case in missing:
        row = measure(*case, rounds=args.rounds) | {"isa": isa, "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
