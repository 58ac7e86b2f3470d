"""benchmarks/beside.py: a checkout beside itself, two tiny cases and a round each; and what it lists as slower."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taps_ext
from taps_ext import ops

ROOT = Path(__file__).parents[2]
if not ops.HAS_EXTENSION or Path(taps_ext.__file__).resolve().parents[1] != ROOT.resolve():
    pytest.skip("the checkout has no extension of its own", allow_module_level=True)

CASES = ["call: 64 x 64, closed, forward, 1, float32", "call: 64 x 64, open, both ways, 1, float32"]


@pytest.fixture(scope="module")
def beside():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import beside

        return beside
    finally:
        sys.path.pop(0)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "beside.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_checkout_beside_itself(tmp_path) -> None:
    file = tmp_path / "folder" / "beside.json"
    options = ("--parts", "layers", "--rounds", 1, "--passes", 1, "--seconds", 0, "--json", file)
    done = run("--old", ROOT, "--only", *CASES, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert {"old", "new", "machine", "settings", "took", "rows"} == set(found)
    assert found["old"]["commit"] == found["new"]["commit"] and found["old"]["machine"] == found["machine"]
    assert found["machine"]["isa"] == ops._C.isa() and found["machine"]["torch"] == torch.__version__
    assert found["machine"]["vendor"] and found["machine"]["threads"] == 1
    assert found["settings"] == {"seconds": 0.0, "rounds": 1, "passes": 1}
    assert [(row["case"], row["variant"]) for row in found["rows"]] == [
        (c, v) for c in CASES for v in ("stock", "taps")
    ]
    for row in found["rows"]:
        assert row["part"] == "layers" and row["weights"] == 4096 and row["calls"] >= 1
        assert row["old"] > 0 and row["new"] > 0 and row["ratios"] == [row["ratio"]]
        assert row["quartiles"] == [row["ratio"], row["ratio"]]
        assert row["ratio"] == pytest.approx(row["new"] / row["old"], abs=1e-4)
    assert str(ROOT) not in file.read_text()
    for case in CASES:
        assert f"| {case} | 4,096 |" in done.stdout
    assert "Slower at a million weights or more" in done.stdout and "What small layers lose" in done.stdout


def test_a_checkout_is_expected(tmp_path) -> None:
    """Without a package of its own, Python would find another one."""
    done = run("--old", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path.resolve()}: a checkout with its extension compiled was expected" in done.stderr


def test_what_is_listed(beside) -> None:
    def row(case: str, weights: int, ratio: float, low: float) -> dict:
        times = {"old": [1.0, 1.0, 1.0], "new": [low, ratio, ratio + 0.1]}
        found = beside.row("layers", case, "taps", weights, 1, times)
        assert found["ratio"] == ratio and found["quartiles"][0] == pytest.approx((low + ratio) / 2, abs=1e-4)
        return found

    rows = [
        row("large and slower", 1_000_000, 1.05, 1.01),
        row("large, as it varies", 2_000_000, 1.05, 0.9),
        row("large and a little slower", 2_000_000, 1.015, 1.01),
        row("small and slower", 999_999, 1.05, 0.9),
        row("small and as before", 4096, 1.02, 1.01),
        {**row("torch alone", 4096, 2.0, 2.0), "variant": "stock"},
    ]
    assert [found["case"] for found in beside.slower(rows)] == ["large and slower"]
    assert [found["case"] for found in beside.lost(rows)] == ["small and slower"]
    text = beside.lists(rows)
    assert ": 1 of 3." in text and ": 1 of 2." in text
    assert "| large and slower | 1,000,000 | 1000 | 1050 | 1.050 (1.03-1.10) |  |" in text
