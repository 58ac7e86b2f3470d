"""On a GPU: gated_linear, forward and backward, against every alternative; the crossover from fused to rebuild.

    python benchmarks/gpu_linear.py --json out.json [--quick]

bf16, cold L2, CUDA graphs, medians. Each row has the time predicted from bytes and operations at the measured copy
bandwidth and matmul rate, the share of that limit, and the ratio to the best alternative at equal memory (a merged copy
of the weight for each task is not one; it is listed).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import check, copy_bandwidth, matmul_rate, median_us, sets_for
from torch import Tensor

from taps_ext import gated_linear, ops

BF16 = torch.bfloat16
Row = dict[str, Any]


class Layer:
    """Operands of one layer [N, K], as many sets as keep the cache cold."""

    def __init__(self, rows: int, outputs: int, inputs: int, delta: torch.dtype) -> None:
        self.rows, self.outputs, self.inputs = rows, outputs, inputs
        self.sets = sets_for(outputs * inputs * 2)  # W alone, as a closed layer reads it

        def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
            return torch.randn(shape, device="cuda", dtype=dtype)

        self.x, self.grad = draw(rows, inputs), draw(rows, outputs)
        self.weights = [draw(outputs, inputs) for _ in range(self.sets)]
        self.deltas = [draw(outputs, inputs, dtype=delta) for _ in range(self.sets)]
        self.buffers = [torch.empty_like(w) for w in self.weights]  # as cold as the rest
        self.open, self.closed = torch.tensor(0.2, device="cuda"), torch.tensor(0.05, device="cuda")
        self.weight_bytes, self.delta_bytes = self.weights[0].nbytes, self.deltas[0].nbytes

    def time(self, call: Callable[[int], Any]) -> float:
        return median_us(call, self.sets)

    def forced(self, path: str | None, call: Callable[[int], Any]) -> float:
        assert ops._C is not None
        ops._C.force_path(path)
        try:
            return self.time(call)
        finally:
            ops._C.force_path(None)


def limit_us(limits: dict[str, float], nbytes: float, operations: float = 0.0) -> float:
    return max(nbytes / limits["copy"], operations / limits["matmul"]) * 1e6


def forward(layer: Layer, limits: dict[str, float], compiled: bool) -> Row:
    """Open: ours on both paths and the alternatives. Closed: ours over F.linear, gates on host and device."""
    x, w, d = layer.x, layer.weights, layer.deltas

    def add_then(i: int) -> Tensor:
        return F.linear(x, torch.add(w[i], d[i], out=layer.buffers[i]))

    def two_products(i: int) -> Tensor:
        return torch.addmm(F.linear(x, w[i]), x, d[i].to(BF16).t())

    def naive(weight: Tensor, delta: Tensor) -> Tensor:
        return F.linear(x, (weight + delta).to(BF16))

    others: dict[str, Callable[[int], Any]] = {
        "naive": lambda i: naive(w[i], d[i]),
        "add, then linear": add_then,
        "two products": two_products,
    }
    if compiled:
        torch._dynamo.reset()  # else the rows become a symbol
        best = torch.compile(naive, mode="max-autotune-no-cudagraphs")
        others["compiled naive"] = lambda i: best(w[i], d[i])
    alternatives = {name: layer.time(call) for name, call in others.items()}
    open_gate: Callable[[int], Any] = lambda i: gated_linear(x, w[i], d[i], gate=True)  # noqa: E731
    paths = {path: layer.forced(path, open_gate) for path in ("fused", "rebuild")}
    ours, merged = layer.time(open_gate), layer.time(lambda i: F.linear(x, w[i]))
    operations = 2.0 * layer.rows * layer.outputs * layer.inputs
    predicted = limit_us(limits, layer.weight_bytes + layer.delta_bytes + x.nbytes + layer.grad.nbytes, operations)
    best_other = min(alternatives.values())
    return {
        "us": ours,
        "paths_us": paths,
        "limit_us": predicted,
        "share_of_limit": predicted / ours,
        "alternatives_us": alternatives,
        "speedup_over_best": best_other / ours,
        "merged_us": merged,
        "closed_host_over_merged": layer.time(lambda i: gated_linear(x, w[i], d[i], gate=False)) / merged,
        "closed_device_over_merged": layer.time(lambda i: gated_linear(x, w[i], d[i], layer.closed)) / merged,
        "open_device_over_host": layer.time(lambda i: gated_linear(x, w[i], d[i], layer.open)) / ours,
    }


def backward(layer: Layer, limits: dict[str, float]) -> Row:
    """Input gradient, and weight gradient with <G, Delta>: open (dDelta leaves) and closed (only the scalar)."""
    x, w, d, grad = layer.x, layer.weights, layer.deltas, layer.grad
    op = torch.ops.taps_ext.gated_linear_backward

    def ours(mask: list[bool], gate: bool) -> Callable[[int], Any]:
        score = layer.open if gate else layer.closed
        return lambda i: op(grad, x, w[i], d[i], score, gate, 0.1, mask, None, 1.0)

    out = layer.buffers
    plain = layer.time(lambda i: torch.mm(grad.t(), x, out=out[i]))

    def separately(i: int) -> tuple[Tensor, Tensor]:
        gradient = torch.mm(grad.t(), x, out=out[i])
        return gradient.to(d[i].dtype), (gradient * d[i]).sum()

    operations = 2.0 * layer.rows * layer.outputs * layer.inputs
    activations = x.nbytes + grad.nbytes
    masks = {"input": [True, False, False, False, False], "open": [False, True, True, False, False]}
    masks["closed"] = [False, False, True, False, False]
    rows = {}
    for name, mask in masks.items():
        call = ours(mask, name != "closed")
        moved = {
            "input": layer.weight_bytes + layer.delta_bytes,
            "open": 2 * layer.delta_bytes,
            "closed": layer.delta_bytes,
        }
        predicted = limit_us(limits, moved[name] + activations, operations)
        paths = {path: layer.forced(path, call) for path in ("fused", "rebuild")}
        chosen = layer.time(call)
        rows[name] = {"us": chosen, "paths_us": paths, "limit_us": predicted, "share_of_limit": predicted / chosen}
    rows["input"]["merged_us"] = layer.time(lambda i: torch.mm(grad, w[i]))
    for name in ("open", "closed"):
        rows[name]["over_plain_wgrad"] = rows[name]["us"] / plain
    separate = layer.time(separately)
    return {**rows, "plain_wgrad_us": plain, "separate_us": separate, "speedup_open": separate / rows["open"]["us"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="two small cases, to see that everything runs")
    args = parser.parse_args()
    check(parser, args.json)
    limits = {"copy": copy_bandwidth(), "matmul": matmul_rate()}
    cases = [
        (m, n, k, t) for n, k in ((4096, 4096), (1024, 4096)) for m in (1, 8, 16, 64) for t in (BF16, torch.float32)
    ]
    cases += [(m, 4096, 4096, torch.float32) for m in (32, 128, 256, 512, 4096, 8192)]
    cases += [(m, 4090, 4100, BF16) for m in (1, 16, 64)]  # off the tile grid: rows of whole words
    cases += [(m, 1000, 4088, BF16) for m in (1, 16, 64)]  # rows of whole 16 bytes
    cases += [(m, 768, 3072, torch.float32) for m in (197, 12608)]  # ViT-B: one image, a batch of 64
    if args.quick:
        cases = [(8, 256, 512, torch.float32), (300, 256, 512, BF16)]
    report: dict[str, Any] = {"limits": limits, "rows": []}
    for rows, outputs, inputs, delta in cases:
        layer = Layer(rows, outputs, inputs, delta)
        compiled = (rows, outputs, inputs, delta) in ((16, 4096, 4096, BF16), (64, 4096, 4096, BF16))
        row: Row = {"M": rows, "N": outputs, "K": inputs, "delta": str(delta).removeprefix("torch.")}
        with torch.no_grad():
            row["forward"] = forward(layer, limits, compiled)
            row["backward"] = backward(layer, limits)
        report["rows"].append(row)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        found = row["forward"]
        print(
            f"M={rows} N={outputs} K={inputs} {row['delta']}: {found['us']:.1f} us, "
            f"{100 * found['share_of_limit']:.0f} % of the limit, {found['speedup_over_best']:.2f} x the best; "
            f"paths {found['paths_us']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
