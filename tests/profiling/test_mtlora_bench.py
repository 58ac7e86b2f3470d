"""benchmarks/mtlora.py: what is timed computes the same, and at length a row of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import mtlora

        return mtlora
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("case", "size"),
    [("swin_small", (40, 56)), pytest.param("swin_tiny", (64, 64), marks=pytest.mark.thorough)],
    ids=["small", "tiny"],
)
def test_all_compute_the_same(bench: Any, case: str, size: tuple[int, int]) -> None:
    """And the check sees it where one does not: a factor of one task is another one."""

    def variants() -> tuple[Any, Any]:
        model = bench.adapted(case, size, 2)
        x = bench.inputs(2, size, "cpu")
        return model, {name: bench.variant(name, model, case, x) for name in bench.VARIANTS}

    model, found = variants()
    bench.check(found, model)
    model, found = variants()
    factors = found["a"].model.factors
    with torch.no_grad():
        factors["t1", "layers.1.blocks.1.mlp.fc2"][1].mul_(2)
    with pytest.raises(RuntimeError, match="mtlora: a, output of t1: off by"):
        bench.check(found, model)


@pytest.mark.thorough
def test_a_row(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Rows that are there are not measured again, and are printed."""
    file = tmp_path / "folder" / "mtlora.jsonl"
    monkeypatch.setitem(bench.SIZES, "swin_small", (2, (40, 56)))  # of what is timed here; peaks are of processes
    words = ["mtlora.py", "--results", str(file), "--models", "swin_small", "--tasks", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--threads", "1"])
    bench.main()
    bench.main()
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert row["tasks"] == 2 and row["ms"].keys() == row["ratio"].keys() == set(bench.PHASES)
    assert set(row["peak"]) == set(bench.VARIANTS) and min(row["peak"].values()) > 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["mtlora.py", "--results", str(file), "--table"])
    bench.main()
    assert "| swin_small, 40 x 56, batch 2 | 2 | step |" in capsys.readouterr().out
