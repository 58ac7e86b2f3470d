"""Speed, asserted: every case of `taps bench` under pytest-benchmark, against alternatives and the committed results.

    make bench          # these tests, whole models, a training step, then the picture and docs/benchmarks.md
    make bench-layers   # measure benchmarks/results/<instruction set>/layers.json anew

Variants take turns within one case and ratios of medians are compared, since times mean little on a shared machine; all
cases are measured in PASSES, one after the other, because some ops run at two speeds. Two things are
asserted of the passes' medians. No case is slower than the best alternative by more than MARGIN, but for those that are
known to lose, with their bounds and reasons in LOSES and LOSES_OF. And no ratio to the stock op exceeds the highest of
the committed passes by more than DRIFT, where they were measured on such a machine.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from taps_ext import bench
from taps_ext.cli.env import facts

RESULTS = Path(__file__).parent / "results"
SECONDS, PASSES = 3.0, 3  # for a case
MARGIN, DRIFT = 1.15, 1.4
NARROW = "two products with a Delta that was cast to bf16 read 4 bytes a weight, not 6"
CALL = "Python's part of a call, against one call of torch.add"
LOSES = {
    "linear: 4096 x 4096, 1, bfloat16": (1.3, NARROW),
    "linear: 3072 x 768, 1, bfloat16": (1.6, NARROW),
    "linear: 1024 x 1024, 1, bfloat16": (1.6, NARROW),
    "call: 64 x 64, open, forward, 1, float32": (3.0, CALL),
}
FAST = "torch multiplies few rows of bf16 as fast as it reads weights, and its Delta is bf16"
LOSES_OF = {  # where more or other cases lose on machines with an instruction set
    "avx512bf16": {
        "linear: 4096 x 4096, 1, bfloat16": (1.7, FAST),
        "linear: 3072 x 768, 1, bfloat16": (2.2, FAST),
        "linear: 3072 x 768, Delta too, 1, bfloat16": (1.5, "two products of torch's stream better than one sum"),
        "linear: 3072 x 768, 8, bfloat16": (1.5, FAST),
    }
}


def alike(machine: dict[str, Any]) -> bool:
    """Whether a machine that `taps env` told of is such a one as this."""
    here = facts()
    return all(here["cpu"].get(key) == machine["cpu"].get(key) for key in ("model", "threads", "capability"))


def reference() -> dict[str, float]:
    """The highest committed ratios by name, or none where they are of another machine."""
    path = RESULTS / facts()["extension"]["isa"] / "layers.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found is None or not alike(found["machine"]):
        warnings.warn(
            "there are no committed results of such a machine: ratios are not compared with them", stacklevel=1
        )
        return {}
    return {row["name"]: max([row["ratio"], *row.get("ratios", ())]) for row in found["results"]}


@pytest.fixture(scope="module")
def committed() -> dict[str, float]:
    return reference()


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, bench.Result]:
    """Every case that a test was chosen for, by name."""
    bench.keep_freed_memory()
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]
    results = bench.run(cases, seconds=SECONDS * len(cases), passes=PASSES)
    return {result.name: result for result in results}


@pytest.mark.parametrize("case", bench.suite(), ids=lambda case: case.name)
def test_layer(
    case: bench.Case, benchmark: Any, measured: dict[str, bench.Result], committed: dict[str, float]
) -> None:
    result = measured[case.name]
    benchmark.group = case.group
    benchmark.extra_info.update(result.to_dict())
    taps = case.make()["taps"]
    turns = iter(range(10**9))
    with torch.set_grad_enabled(case.gradients):
        benchmark.pedantic(lambda: taps(next(turns)), rounds=5, warmup_rounds=1)
    if result.name in committed:
        before = committed[result.name]
        assert result.ratio <= DRIFT * before, f"{result.ratio:.2f} of the stock op, {before:.2f} when committed"
    if result.against is not None:
        loses = {**LOSES, **LOSES_OF.get(facts()["extension"]["isa"], {})}
        most, why = loses.get(result.name, (MARGIN, ""))
        assert result.against <= most, f"{result.against:.2f} of {result.alternative}, {most} allowed {why}"
