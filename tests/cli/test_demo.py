"""The demo from end to end, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taps_ext.cli import main
from taps_ext.errors import ConfigError
from taps_ext.plot import heatmap

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "taps_ext", "demo", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=400)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_report(demo: tuple[Path, str]) -> None:
    out, printed = demo
    report = json.loads((out / "report.json").read_text())
    tasks = report["tasks"]
    assert len(tasks) >= 5 and len({task["source"].split(":")[0] for task in tasks.values()}) >= 2
    assert report["base_unchanged"] is True and report["bit_equal"] is True and report["quick"] is True
    for name, task in tasks.items():
        assert name in printed and task["bit_equal"] is True
        assert all(0 <= task[method] <= 1 for method in ("probe", "full", "taps"))
        assert 0 <= task["layers_open"] <= task["layers"] == 15 and 0 <= task["share"] <= 1
        assert task["bytes"] == (out / task["file"]).stat().st_size
        rows = task["methods"]["taps"]["rows"]
        assert [row["change"] is not None for row in rows] == [row["open"] for row in rows]
        assert task["methods"]["probe"]["layers_open"] == 0 and task["methods"]["full"]["share"] == 1
    assert report["base"]["bytes"] == (out / "base.safetensors").stat().st_size
    assert (out / "heatmap.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_files_work_with_the_other_commands(demo: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = demo
    files = sorted(str(file) for file in out.glob("*/*.taps"))
    assert len(files) == 18 and main(["verify", *files]) == 0
    capsys.readouterr()
    assert main(["eval", str(out / "taps/print.taps"), "--config", str(out / "demo.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 800  # all of the test split, unlike the quick run


def test_heatmap_is_a_picture(tmp_path: Path) -> None:
    changes = {"a": [None, 0.5], "b": [0.1, None], "all closed": [None, None]}
    heatmap(tmp_path / "h.png", ["stem", "fc"], changes, notes={"a": "x"}, sizes=[100, 2000])
    assert (tmp_path / "h.png").stat().st_size > 5000
    heatmap(tmp_path / "empty.png", ["stem"], {"a": [None]})
    with pytest.raises(ConfigError, match="expected layers and tasks, got 0 layers"):
        heatmap(tmp_path / "h.png", [], {"a": []})
    with pytest.raises(ConfigError, match="expected 1 layers, got 2"):
        heatmap(tmp_path / "h.png", ["stem"], {"a": [None, 0.5]})
