"""benchmarks/dense_study.py: its grid and what it says of records, a tiny run, and at length the whole script."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("scipy")

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "camvid.zip").exists(), reason="no ../shared/data/camvid.zip")
needs_base = pytest.mark.skipif(
    not (DATA / "mobilenet_v2-imagenet1k.safetensors").exists(), reason="no ../shared/data/mobilenet_v2-*.safetensors"
)


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import dense_study

        return dense_study
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def settings(study: Any, tmp_path: Path) -> Any:
    return study.Settings(DATA, tmp_path / "bases", tmp_path / "runs", images=2, epochs=1)


def untrained(folder: Path) -> None:
    from taps_ext import store

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from small_bases import make
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    torch.manual_seed(0)
    folder.mkdir()
    store.write_safetensors(folder / "swin.safetensors", make("swin").state_dict(), {"format": "pt"})


def record(study: Any, job: Any, values: tuple[float, float, float]) -> dict[str, Any]:
    found = dict(zip(study.KINDS, values, strict=True))
    split = {"val": found, "test": found if job.part == "final" else None}
    sizes = dict.fromkeys(("trained", "parameters", "bytes"), 10 * len(job.method))
    return {**study.asdict(job), **split, "cpu_seconds": 1.0, **sizes}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))


def test_rates_before_runs(study: Any, settings: Any, tmp_path: Path) -> None:
    """Nothing is trained at length before both rates have been tried; then with the better one, distances down."""
    file = tmp_path / "rows.jsonl"
    first = list(study.waiting(file, settings))
    assert {job.part for job in first} == {"trial"} and len(first) == len(set(first))
    tried = [job for job in first if (job.base, job.method) == ("swin", "lora:16")]
    assert [job.lr for job in tried] == list(study.RATES["small"])
    assert not [job for job in first if job.method == "lora:4"]
    rows = [record(study, tried[0], (0.2, 0.5, 0.4)), record(study, tried[1], (0.2, 0.5, 0.3))]
    write(file, rows[:1])
    assert not [job for job in study.waiting(file, settings) if job.part == "final"]
    write(file, rows)
    ready = [job for job in study.waiting(file, settings) if job.part == "final"]
    assert {(job.method, job.lr, job.seed) for job in ready} == {
        (method, tried[1].lr, seed) for method in ("lora:16", "lora:4") for seed in (0, 1, 2)
    }
    write(file, [rows[0], {**rows[1], "val": None}])  # a rate that diverged is not taken
    assert {job.lr for job in study.waiting(file, settings) if job.part == "final"} == {tried[0].lr}


def test_what_it_says(study: Any, settings: Any, tmp_path: Path) -> None:
    """delta_m is against the mean of fine-tuning, a claim is paired by seed, and runs of another length are not mixed
    in."""
    file = tmp_path / "rows.jsonl"

    def job(method: str, seed: int, epochs: int = 1) -> Any:
        return study.Job("final", "swin", method, 1e-3, seed, epochs, settings.images)

    rows = [record(study, job("single", seed), (0.4, 0.8, 0.2)) for seed in (0, 1)]
    rows += [record(study, job("decoders", seed), (0.4, 0.8, 0.22)) for seed in (0, 1, 2)]
    rows += [record(study, job("mtlora:16", seed), (0.44 + 0.04 * seed, 0.8, 0.2)) for seed in (0, 1, 2)]
    rows.append(record(study, job("mtlora:16", 0, epochs=9), (0.9, 0.9, 0.9)))
    write(file, rows)
    apart = study.deltas(study.by_method(file, settings)["swin"], "swin")
    assert apart["single"] == pytest.approx({0: 0.0, 1: 0.0})
    assert apart["decoders"] == pytest.approx(dict.fromkeys((0, 1, 2), -10 / 3))
    assert apart["mtlora:16"] == pytest.approx({0: 10 / 3, 1: 20 / 3, 2: 10.0})
    text = study.tables(file, settings)
    # Differences of 20/3, 10 and 40/3: 10 on average, 4.303 * (10/3) / sqrt(3) = 8.28 to either side.
    assert "| mtlora:16 above decoders | +10.0 ± 8.3: held |" in text
    assert "| single | 0.001 | 2 | 0.4000 ± 0.0000 |" in text and "0.9000" not in text
    if importlib.util.find_spec("matplotlib"):
        study.plot(file, tmp_path, settings)
        assert {path.name for path in tmp_path.glob("*.png")} == {"dense-trained.png", "dense-files.png"}


def test_names_the_base_that_is_missing(study: Any, settings: Any) -> None:
    with pytest.raises(SystemExit, match=r"swin.safetensors: expected the pretrained base; python benchmarks/pretrain"):
        study.backbone_of(settings, "swin")


@needs_data
@pytest.mark.parametrize("method", ["mtlora:4", pytest.param("joint-taps", marks=pytest.mark.thorough)])
def test_a_run(study: Any, settings: Any, method: str) -> None:
    untrained(settings.bases)
    job = study.Job("final", "swin", method, 1e-3, 0, 1, settings.images)
    found = study.run(job, settings)
    assert study.key_of(found) == job.key and found["base_bit_equal"]
    assert found["test"].keys() == found["val"].keys() == study.KINDS.keys()
    files = [path.stat().st_size for path in (settings.runs / job.folder).glob("*.taps")]
    assert len(files) == 4 and found["bytes"] == sum(files)  # three tasks, and what they share
    assert 4 * found["parameters"] < found["bytes"] < 4 * found["parameters"] + 200_000  # and their descriptions
    assert 0 < found["shared"] < found["parameters"] <= found["trained"]


@needs_data
@needs_base
@pytest.mark.thorough
def test_the_script(tmp_path: Path) -> None:
    """Runs are not done twice; a patch leads to segmentation and back."""
    untrained(tmp_path / "bases")
    file = tmp_path / "rows.jsonl"

    def call(command: str, *more: object) -> str:
        places = ["--data", DATA, "--bases", tmp_path / "bases", "--runs", tmp_path / "runs"]
        small = ["--results", file, "--images", 2, "--epochs", 1, "--workers", 1]
        words = [sys.executable, ROOT / "benchmarks" / "dense_study.py", command, *places, *small, *more]
        done = subprocess.run(
            list(map(str, words)),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    methods = ("--methods", "mobilenet:scale-bias")
    assert "| mobilenet | scale-bias |" in call("plan", *methods)
    call("run", *methods, "--only", 1)
    assert len(file.read_text().splitlines()) == 1
    file.write_text(file.read_text() + '{"part": "fi')  # a run that was killed while it wrote
    call("run", *methods)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4 and len({(row["part"], row["lr"], row["seed"]) for row in rows}) == 4  # two rates, two seeds
    assert call("run", *methods) == ""
    found = json.loads(call("patch"))
    assert found["maps_bit_equal"] and found["classifier_bit_equal"]
    assert found["elements"] <= 4 * 17_056 + 52  # scale, bias and statistics of 17,056 channels, a count for each norm
