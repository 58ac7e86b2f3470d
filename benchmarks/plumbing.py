"""What this package's own calls cost, where kernels cost little: thirty small layers, and a ResNet-50 with one image.

    python benchmarks/plumbing.py [--json FILE]

Small layers: thirty `Linear(64, 64)` with one row, each of a `TaskModel`'s gates open or closed, over the plain model
in the same process, call by call in turns; medians of the ratios. "operator" holds the plain functions of the extension
off, so that every open layer calls `torch.ops.taps_ext.gated_linear`.

ResNet-50: one image of 224 x 224, no gradients, every layer open and unmerged, with the plain functions and by the
operator, in turns. "cold": between two forwards other memory is written that no cache holds beside the model, as in a
server that does something else, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import taps_ext
from taps_ext import TapsConfig, TaskModel
from taps_ext.ops import _C

Run = Callable[[], Any]
SMALL, RESNET = "thirty Linear(64, 64), one row", "ResNet-50, one image"


@contextmanager
def operators_alone() -> Iterator[None]:
    """Without the plain functions that stand in for operators."""
    assert _C is not None
    kept = _C.linear, _C.conv2d
    _C.linear = _C.conv2d = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        _C.linear, _C.conv2d = kept  # type: ignore[assignment]


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs: dict[str, Run], rounds: int, before: Run = lambda: None) -> dict[str, list[float]]:
    """Seconds of each, one call after the other's."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before()
            found[name].append(seconds(run))
    return found


def over(found: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median ratios to `base` in the same round."""
    return {
        name: round(statistics.median(a / b for a, b in zip(times, found[base], strict=True)), 4)
        for name, times in found.items()
    }


def opened(base: nn.Module, share: float) -> TaskModel:
    model = TaskModel(base, TapsConfig(lam=1.0)).eval()
    model.add_task("t")
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            assert part.change.delta is not None and part.gate.score is not None
            part.change.delta.normal_(0, 0.01)
            part.gate.score.fill_(0.2 if share else 0.0)
    model.set_task("t")
    return model


def small(rounds: int) -> dict[str, Any]:
    """Of thirty small layers and one thread, by what is run: ratios to the plain model, and its microseconds."""
    torch.set_num_threads(1)

    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(64, 64) for _ in range(30)], nn.Linear(64, 2)).eval()

    plain, closed, op = layers(), opened(layers(), 0), opened(layers(), 1)
    x = torch.randn(1, 64)
    results: dict[str, Any] = {}
    with torch.no_grad():
        runs: dict[str, Run] = {"plain": lambda: plain(x), "closed": lambda: closed(x), "open": lambda: op(x)}
        in_turns(runs, 50)
        results["no gradients"] = over(in_turns(runs, rounds), "plain")
        with operators_alone():
            results["no gradients, operator"] = over(in_turns(runs, rounds), "plain")
    plain.requires_grad_(True)
    for model in (closed, op):
        model.train()

    def step(model: nn.Module) -> Run:
        parameters = list(model.parameters())  # as an optimizer has them

        def run() -> None:
            for parameter in parameters:
                parameter.grad = None
            model(x).sum().backward()

        return run

    runs = {"plain": step(plain), "closed": step(closed), "open": step(op)}
    in_turns(runs, 20)
    results["forward and backward"] = over(in_turns(runs, rounds // 2), "plain")
    with operators_alone():
        results["forward and backward, operator"] = over(in_turns(runs, rounds // 2), "plain")
    microseconds = in_turns({"plain": lambda: plain(x)}, rounds)["plain"]
    results["plain, microseconds"] = round(1e6 * statistics.median(microseconds), 1)
    return results


def resnet(rounds: int) -> dict[str, Any]:
    """Of one image and two threads: milliseconds with the plain functions, and the operator's ratio to them."""
    import timm

    torch.set_num_threads(2)
    torch.manual_seed(0)
    base = timm.create_model("resnet50").eval()
    model = opened(base, 1)
    x = torch.randn(1, 3, 224, 224)
    other = torch.zeros(64 << 20)  # 256 MiB

    def by_operator() -> None:
        with operators_alone():
            model(x)

    results = {}
    with torch.no_grad():
        for name, before in (("warm", lambda: None), ("cold", lambda: other.add_(1.0))):
            runs: dict[str, Run] = {"direct": lambda: model(x), "operator": by_operator}
            in_turns(runs, 3, before)
            found = in_turns(runs, rounds, before)
            results[name] = {
                "operator over direct": over(found, "direct")["operator"],
                "direct, ms": round(1e3 * statistics.median(found["direct"]), 2),
            }
    return results


def table(results: dict[str, Any]) -> str:
    """What was written with --json, in Markdown."""
    found = results[SMALL]
    lines = [f"| {SMALL} | closed | open | closed, operator | open, operator |", "|---|---|---|---|---|"]
    for name in ("no gradients", "forward and backward"):
        ratios = [found[name + operator][gate] for operator in ("", ", operator") for gate in ("closed", "open")]
        lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    if RESNET in results:
        lines += ["", f"| {RESNET} | plain functions, ms | operator / plain functions |", "|---|---|---|"]
        for name, row in results[RESNET].items():
            lines.append(f"| {name} | {row['direct, ms']:.1f} | {row['operator over direct']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--skip-resnet", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__, "taps_ext": taps_ext.__version__}
    results["isa"] = None if _C is None else _C.isa()
    results[SMALL] = small(args.rounds)
    if not args.skip_resnet:
        results[RESNET] = resnet(max(10, args.rounds // 20))
    print(json.dumps(results, indent=1))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
