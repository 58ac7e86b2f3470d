"""Speed, asserted: every case of `taps bench` under pytest-benchmark, against alternatives and the committed results.

    make bench          # these tests, then a training step, then the pictures and docs/benchmarks.md
    make bench-layers   # measure benchmarks/results/layers-cpu.json anew

Variants take turns within one case and ratios of medians are compared, since times mean little on a shared machine.
Two things are asserted: no case is slower than the best alternative by more than MARGIN, and no ratio to the stock op
is worse by more than DRIFT than the committed one, where that was measured on the same kind of CPU. What is known to
lose stands in LOSES, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from taps_ext import bench, ops

REFERENCE = Path(__file__).parent / "results" / "layers-cpu.json"
SECONDS = 3.0  # for a case
MARGIN, DRIFT = 1.05, 1.25
LOSES = {
    ("linear", torch.bfloat16, 1): "two products with a Delta that was cast to bf16 read 4 bytes a weight, not 6",
    ("call", torch.float32, 1): "an operator's call, or autograd.Function's",
}


def reference() -> dict[str, float]:
    """The committed ratios by name, or none where the machine is of another kind."""
    if not REFERENCE.exists():
        return {}
    found: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    extension = found["machine"]["extension"]
    if ops._C is None or extension["isa"] != ops._C.isa():
        return {}
    return {row["name"]: row["ratio"] for row in found["results"]}


@pytest.mark.parametrize("case", bench.suite(), ids=lambda case: case.name)
def test_layer(case: bench.Case, benchmark: Any) -> None:
    (result,) = bench.run([case], seconds=SECONDS)
    benchmark.group = case.group
    benchmark.extra_info.update(result.to_dict())
    taps = case.make()["taps"]
    turns = iter(range(10**9))
    benchmark.pedantic(lambda: taps(next(turns)), rounds=5, warmup_rounds=1)
    committed = reference().get(result.name)
    if committed is not None:
        assert result.ratio <= DRIFT * committed, f"{result.ratio:.2f} of the stock op, {committed:.2f} when committed"
    if result.against is not None and (case.group, case.dtype, case.rows) not in LOSES:
        assert result.against <= MARGIN, f"{result.against:.2f} of {result.alternative}"
