"""The operators of mixed batches beside every other way to multiply rows of many tasks, and the roads that
choose_mixing() picks from.

    python benchmarks/mixed_ops.py [--json FILE] [--seconds S] [--only TEXT] [--threads N] [--roads]

CPU; the machine must be quiet. Every line is one run in which all variants take turns; figures are times over the base
alone on the same rows:

    mixed     taps_ext.mixed_linear (mixed_conv2d, mixed_lowrank), ids shuffled
    sorted    the same, ids in order
    loop      task by task: index_select, gated_linear, index_copy_
    rebuild   task by task: torch.add(W, Delta, out=buffer), the stock op
    grouped   the base on all rows, and torch._grouped_mm on stacked Deltas, which are made once

Weights and Deltas change from call to call, so that they are cold where a model's would be. `--roads`: own and apart by
force, without gradients, in a training forward and in its backward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taps_ext import gated_conv2d, gated_linear, mixed_conv2d, mixed_linear, mixed_lowrank, ops
from taps_ext.bench import keep_freed_memory
from taps_ext.bench.timing import interleaved

CPU = torch.device("cpu")
COLD = 128 << 20  # bytes of weights that take turns
Variant = Callable[[int], Any]


def ids_of(tasks: int, samples: int) -> Tensor:
    """As many samples of each, shuffled."""
    ids = torch.arange(tasks).repeat_interleave(samples // tasks)
    return ids[torch.randperm(samples, generator=torch.Generator().manual_seed(0))]


class Layers:
    """Layers that take turns: W and the Deltas of all tasks."""

    def __init__(self, shape: tuple[int, ...], tasks: int, grad: bool = False) -> None:
        each = 4 * torch.Size(shape).numel() * (tasks + 1)
        self.count = max(1, min(16, COLD // each))
        scale = torch.Size(shape[1:]).numel() ** -0.5
        self.weights = [torch.randn(shape) * scale for _ in range(self.count)]
        self.deltas = [
            [(torch.randn(shape) * 0.01 * scale).requires_grad_(grad) for _ in range(tasks)] for _ in range(self.count)
        ]

    def __getitem__(self, index: int) -> tuple[Tensor, list[Tensor]]:
        return self.weights[index % self.count], self.deltas[index % self.count]


def linear_variants(rows: int, tasks: int, samples: int, n: int, k: int, share: float = 1.0) -> dict[str, Variant]:
    """`rows` of each of the samples; of the tasks `share` are open."""
    layers, ids = Layers((n, k), tasks), ids_of(tasks, samples)
    x, bias, buffer = torch.randn(samples, rows, k), torch.randn(n), torch.empty(n, k)
    gates = [task < round(share * tasks) for task in range(tasks)]
    parts = [(task, (ids == task).nonzero().flatten()) for task in range(tasks)]
    ordered = ids.sort().values
    is_open = torch.tensor(gates)[ids]
    variants: dict[str, Variant] = {}

    def mixed(of: Tensor, index: int) -> Tensor:
        weight, deltas = layers[index]
        return mixed_linear(x, weight, deltas, None, of, bias, gates=gates)

    def loop(index: int) -> Tensor:
        weight, deltas = layers[index]
        output = torch.empty(samples, rows, n)
        for task, at in parts:
            output.index_copy_(0, at, gated_linear(x[at], weight, deltas[task], None, bias, gate=gates[task]))
        return output

    def rebuild(index: int) -> Tensor:
        weight, deltas = layers[index]
        output = torch.empty(samples, rows, n)
        for task, at in parts:
            own = torch.add(weight, deltas[task], out=buffer) if gates[task] else weight
            output.index_copy_(0, at, F.linear(x[at], own, bias))
        return output

    stacked = [torch.stack(deltas).bfloat16() if hasattr(torch, "_grouped_mm") else None for deltas in layers.deltas]
    ends = torch.tensor([len(at) * rows for _, at in parts]).cumsum(0).to(torch.int32)
    order = torch.cat([at for _, at in parts])

    def grouped(index: int) -> Tensor:
        """In bf16, the one type that it knows, with the sums in it."""
        output = F.linear(x, layers[index][0], bias).reshape(samples * rows, n)
        own = x[order].reshape(-1, k).bfloat16()
        added = torch._grouped_mm(own, stacked[index % layers.count].transpose(1, 2), offs=ends)  # type: ignore[union-attr]
        return output.view(samples, rows, n).index_add_(0, order, added.float().view(samples, rows, n))

    variants["base"] = lambda index: F.linear(x, layers[index][0], bias)
    variants["mixed"] = lambda index: mixed(ids, index)
    variants["sorted"] = lambda index: mixed(ordered, index)
    variants["loop"], variants["rebuild"] = loop, rebuild
    if bool(is_open.all()):
        try:
            grouped(0)
            variants["grouped"] = grouped
        except (RuntimeError, AttributeError):  # this torch has none for a CPU
            pass
    return variants


def conv_variants(tasks: int, samples: int, o: int, c: int, side: int, kernel: int) -> dict[str, Variant]:
    layers, ids = Layers((o, c, kernel, kernel), tasks), ids_of(tasks, samples)
    x, buffer = torch.randn(samples, c, side, side), torch.empty(o, c, kernel, kernel)
    parts = [(task, (ids == task).nonzero().flatten()) for task in range(tasks)]
    ordered, pad, gates = ids.sort().values, kernel // 2, [True] * tasks

    def mixed(of: Tensor, index: int) -> Tensor:
        weight, deltas = layers[index]
        return mixed_conv2d(x, weight, deltas, None, of, None, 1, pad, gates=gates)

    def each(index: int, layer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        weight, deltas = layers[index]
        output = torch.empty(samples, o, side, side)
        for task, at in parts:
            output.index_copy_(0, at, layer(x[at], weight, deltas[task]))
        return output

    return {
        "base": lambda index: F.conv2d(x, layers[index][0], None, 1, pad),
        "mixed": lambda index: mixed(ids, index),
        "sorted": lambda index: mixed(ordered, index),
        "loop": lambda index: each(index, lambda p, w, d: gated_conv2d(p, w, d, None, None, 1, pad, gate=True)),
        "rebuild": lambda index: each(index, lambda p, w, d: F.conv2d(p, torch.add(w, d, out=buffer), None, 1, pad)),
    }


def lowrank_variants(rows: int, tasks: int, samples: int, n: int, k: int, rank: int) -> dict[str, Variant]:
    """The base is the layer's own product, beside which these are small; a loop as peft does it."""
    ids, x, weight = ids_of(tasks, samples), torch.randn(samples, rows, k), torch.randn(n, k) * k**-0.5
    a = [torch.randn(rank, k) * k**-0.5 for _ in range(tasks)]
    b = [torch.randn(n, rank) for _ in range(tasks)]
    scales, ordered = [2.0] * tasks, ids.sort().values
    parts = [(task, (ids == task).nonzero().flatten()) for task in range(tasks)]

    def loop(index: int) -> Tensor:
        output = F.linear(x, weight)
        for task, at in parts:
            output[at] += 2.0 * F.linear(F.linear(x[at], a[task]), b[task])
        return output

    return {
        "base": lambda index: F.linear(x, weight),
        "mixed": lambda index: F.linear(x, weight).add_(mixed_lowrank(x, a, b, ids, scales)),
        "sorted": lambda index: F.linear(x, weight).add_(mixed_lowrank(x, a, b, ordered, scales)),
        "loop": loop,
    }


def road_variants(rows: int, tasks: int, n: int, k: int, mode: str) -> dict[str, Variant]:
    """`rows` of each task by force on either road; `mode`: inference, forward (of training) or backward."""
    layers, ids = Layers((n, k), tasks), torch.arange(tasks)
    x, dy = torch.randn(tasks * rows, k), torch.randn(tasks * rows, n)
    none, gates = [None] * tasks, [1] * tasks

    def run(index: int) -> Any:
        weight, deltas = layers[index]
        if mode == "backward":
            masks = ([True, False, False], [False] * tasks, [False] * tasks)
            return torch.ops.taps_ext.mixed_linear_backward(dy, None, weight, deltas, none, ids, gates, 0.1, *masks)
        return torch.ops.taps_ext.mixed_linear(x, weight, deltas, none, ids, None, gates, 0.1, mode == "forward")

    def forced(road: str) -> Variant:
        def call(index: int) -> Any:
            ops._C.force_mixing(road)  # type: ignore[union-attr]
            try:
                return run(index)
            finally:
                ops._C.force_mixing(None)  # type: ignore[union-attr]

        return call

    base: Variant = lambda index: F.linear(x, layers[index][0])  # noqa: E731
    if mode == "backward":
        base = lambda index: dy @ layers[index][0]  # noqa: E731
    return {"base": base, "own": forced("own"), "apart": forced("apart")}


def roads() -> dict[str, Callable[[], dict[str, Variant]]]:
    found: dict[str, Callable[[], dict[str, Variant]]] = {}
    for mode in ("inference", "forward", "backward"):
        for side, tasks in ((512, 16), (512, 64), (1024, 16), (1024, 64), (4096, 4)):
            for rows in (1, 4, 16, 64):
                name = f"roads, {mode}, {side}^2, {tasks} tasks of {rows} rows"
                found[name] = lambda r=rows, t=tasks, s=side, m=mode: road_variants(r, t, s, s, m)
        for n, k in ((1152, 384), (384, 384), (1536, 384), (384, 1536)):
            for rows in (64, 128, 197, 394):
                name = f"roads, {mode}, {k} -> {n}, 4 tasks of {rows} rows"
                found[name] = lambda r=rows, n=n, k=k, m=mode: road_variants(r, 4, n, k, m)
    return found


def cases() -> dict[str, Callable[[], dict[str, Variant]]]:
    found: dict[str, Callable[[], dict[str, Variant]]] = {}
    for side in (512, 1024, 4096):
        for tasks in (4, 16, 64) if side < 4096 else (4, 16):
            name = f"linear {side}^2, {tasks} tasks of one row"
            found[name] = lambda s=side, t=tasks: linear_variants(1, t, t, s, s)
    for n, k in ((1152, 384), (384, 384), (1536, 384), (384, 1536)):
        for tasks, samples in ((4, 16), (16, 16), (16, 64), (64, 64)):
            name = f"linear {k} -> {n}, {tasks} tasks, {samples} samples of 197 rows"
            found[name] = lambda t=tasks, s=samples, n=n, k=k: linear_variants(197, t, s, n, k)
    found["linear 384 -> 1536, 16 tasks, a quarter open, 64 samples of 197 rows"] = lambda: linear_variants(
        197, 16, 64, 1536, 384, 0.25
    )
    for o, c, side, kernel in ((64, 64, 56, 3), (256, 256, 14, 3), (1024, 256, 14, 1), (512, 512, 7, 3)):
        for tasks, samples in ((16, 16), (16, 64)):
            name = f"conv2d {c} -> {o}, {kernel}x{kernel} on {side}, {tasks} tasks, {samples} images"
            found[name] = lambda t=tasks, s=samples, o=o, c=c, d=side, q=kernel: conv_variants(t, s, o, c, d, q)
    for tasks, samples in ((16, 16), (16, 64)):
        name = f"lowrank 384 -> 1152, rank 8, {tasks} tasks, {samples} samples of 197 rows"
        found[name] = lambda t=tasks, s=samples: lowrank_variants(197, t, s, 1152, 384, 8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the rows, as a list")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    parser.add_argument("--only", default="", help="lines whose name has this in it")
    parser.add_argument("--roads", action="store_true", help="the roads by force")
    parser.add_argument("--threads", type=int, help="of torch; its own number otherwise")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    rows = []
    for name, make in (roads() if args.roads else cases()).items():
        if args.only not in name:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            times = interleaved(make(), args.seconds, CPU)
        over = {variant: seconds / times["base"] for variant, seconds in times.items() if variant != "base"}
        print(
            f"{name:70s} {1e3 * times['base']:9.3f} ms  " + "  ".join(f"{k} {v:.2f}" for k, v in over.items()),
            flush=True,
        )
        rows.append({"name": name, "base_ms": 1e3 * times["base"], "over_base": over})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
