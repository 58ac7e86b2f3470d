"""Every example runs as a user would run it, on tiny data, and does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taps_ext import store

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {
    "timm_model": ["timm"],
    "torchvision_model": ["torchvision"],
    "transformers_model": ["transformers"],
    "text_transformer": ["transformers"],
    "plain_loop": [],
    "callbacks": [],
}


def run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, tmp_path) -> None:
    for library in [*RUNS[name], "sklearn", "matplotlib"]:
        pytest.importorskip(library)
    printed = run(name, tmp_path, "--epochs", "1")
    files = sorted(tmp_path.glob("runs/*/*.taps"))
    assert len(files) == (2 if RUNS[name] == ["transformers"] else 1)
    assert all(store.read_header(file).metadata.method["method"] == "taps" for file in files)
    if name == "torchvision_model":
        assert len(list(tmp_path.glob("runs/torchvision/*.png"))) == 2
    wanted = {
        "text_transformer": "of 4 parts",
        "plain_loop": "merged model equal: True",
        "transformers_model": "ImageClassifierOutput with logits [1, 2]",
    }
    assert wanted.get(name, "test accuracy") in printed
