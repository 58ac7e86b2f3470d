"""Commands that read task files: eval, predict, inspect, verify; and env, selftest."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import folder, refused  # noqa: F401  (fixtures)

from taps_ext import ops, store
from taps_ext.cli import selftest


@pytest.fixture
def taps(folder: Path) -> Path:  # noqa: F811
    return folder / "out/parity.taps"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    from PIL import Image
    from sklearn.datasets import load_digits

    path = tmp_path / "seven.png"
    Image.fromarray((load_digits().images[7] * 15).astype("uint8")).resize((40, 50)).save(path)
    return path


def damage(path: Path, source: Path, where: int) -> Path:
    raw = bytearray(source.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)
    return path


# ------------------------------------------------------------------------------------------------- eval


def test_eval_repeats_the_training_metric(call, folder: Path, taps: Path) -> None:  # noqa: F811
    files = [taps, folder / "out/probed.taps"]
    code, out, _ = call("eval", *files, "--config", folder / "c.toml", "--json")
    results = json.loads(out)
    assert code == 0 and [r["task"] for r in results] == ["parity", "probed"]
    for file, result in zip(files, results, strict=True):
        assert result["accuracy"] == store.read_header(file).metadata.metrics["test"]["accuracy"]  # type: ignore[index]
        assert result["samples"] == 80
    code, out, _ = call("eval", taps, taps, "--config", folder / "c.toml", "--split", "val")
    assert code == 0 and len(out.splitlines()) == 4


def test_eval_without_a_configuration(call, folder: Path, taps: Path) -> None:  # noqa: F811
    base = ["--base", "python:taps_ext.zoo.small_resnet", "--weights", folder / "base.safetensors"]
    args = ["--set", "base.args={widths=[8,16], blocks=1, stem_stride=2}"]
    data = ["--source", f"npz:{folder}/digits.npz", "--size", "16", "--channels", "1"]
    code, out, err = call("eval", taps, *base, *args, *data, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["accuracy"] == store.read_header(taps).metadata.metrics["test"]["accuracy"]  # type: ignore[index]


def test_eval_refusals(call, folder: Path, taps: Path, tmp_path: Path) -> None:  # noqa: F811
    config = ["--config", folder / "c.toml"]
    refused(call("eval", taps), "--config", "--base")
    refused(call("eval", tmp_path / "none.taps", *config), "none.taps", "no such file")
    refused(call("eval", taps, *config, "--task", "partiy"), "did you mean 'parity'")
    refused(call("eval", taps, *config, "--source", "digits:plain"), "digits:plain", "classes")
    refused(call("eval", taps, *config, "--device", "tpu9"), "device", "tpu9")
    refused(call("eval", taps, *config, "--set", "base.seed=-1"), "base.seed")
    refused(call("eval", taps, *config, "--set", "base.weights=random", "--set", "base.seed=1"), "base")
    refused(call("eval", damage(tmp_path / "bad.taps", taps, -3), *config), "bad.taps")


# ---------------------------------------------------------------------------------------------- predict


def test_predict_names_labels(call, folder: Path, taps: Path, image: Path) -> None:  # noqa: F811
    config = ["--config", folder / "c.toml"]
    code, out, _ = call("predict", taps, image, image, *config, "--json")
    found = json.loads(out)["predictions"]
    assert code == 0 and [f["image"] for f in found] == [str(image)] * 2
    assert {t["label"] for t in found[0]["top"]} == {"even", "odd"}
    assert sum(t["probability"] for t in found[0]["top"]) == pytest.approx(1)
    assert found[0]["top"][0]["probability"] >= 0.5 and found[0]["label"] == found[0]["top"][0]["label"]
    code, out, _ = call("predict", taps, image, *config, "--top", "1")
    assert code == 0 and found[0]["label"] in out and out.count("%") == 1


def test_predict_refusals(call, folder: Path, taps: Path, image: Path, tmp_path: Path) -> None:  # noqa: F811
    config = ["--config", folder / "c.toml"]
    refused(call("predict", taps, tmp_path / "none.png", *config), "none.png")
    refused(call("predict", taps, folder / "c.toml", *config), "c.toml", "image")
    refused(call("predict", image, image, *config), "seven.png")
    refused(call("predict", taps, image, *config, "--top", "0"), "--top", "expected an int >= 1")
    refused(call("predict", taps, image, *config, "--channels", "3"), "data.channels", "trained with 1, got 3")


# ------------------------------------------------------------------------------------- inspect and verify


def test_inspect_shows_the_header(call, taps: Path) -> None:
    code, out, _ = call("inspect", taps, "--json")
    facts = json.loads(out)
    assert code == 0 and (facts["task"], facts["kind"], facts["labels"]) == (
        "parity",
        "task",
        ["even", "odd"],
    )
    assert facts["method"]["method"] == "taps" and facts["parent"].startswith("sha256:")
    assert facts["bytes"] == taps.stat().st_size
    record = store.load(taps)
    for layer in facts["layers"]:
        kept = record.parts[layer["layer"]]
        assert layer["open"] == kept.facts["gate"]["open"] and layer["score"] == kept.tensors["score"].item()
        assert layer["bytes"] == (kept.tensors["delta"].nbytes if layer["open"] else 0)
    code, out, _ = call("inspect", taps)
    assert code == 0 and "stem" in out and facts["digest"] in out


def test_inspect_loads_no_tensors(call, taps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.io, "_read_tensor", lambda *a, **k: pytest.fail("a tensor was read"))
    assert call("inspect", taps)[0] == 0


def test_inspect_refuses_damage(call, folder: Path, taps: Path, tmp_path: Path) -> None:  # noqa: F811
    header = store.read_header(taps)
    begin = header.file_bytes - sum(t.nbytes for t in header.tensors.values())
    score = next(n for n, c in header.claims.items() if c.score)
    for where in (3, 40, begin + header.tensors[score].begin):
        refused(call("inspect", damage(tmp_path / "bad.taps", taps, where)), "bad.taps")
    (tmp_path / "cut.taps").write_bytes(taps.read_bytes()[:-5])
    refused(call("inspect", tmp_path / "cut.taps"), "cut.taps")
    (tmp_path / "empty.taps").write_bytes(b"")
    refused(call("inspect", tmp_path / "empty.taps", "--json"), "empty.taps")
    refused(call("inspect", tmp_path), "folder")
    refused(call("inspect", folder / "base.safetensors"), "not a task file")


def test_verify_names_each_bad_file(call, taps: Path, tmp_path: Path) -> None:
    code, out, _ = call("verify", taps)
    assert code == 0 and out.startswith("ok ")
    bad = damage(tmp_path / "bad.taps", taps, -3)
    code, out, _ = call("verify", bad, taps, tmp_path / "none.taps", tmp_path)
    lines = out.splitlines()
    assert code == 1 and [line.split()[0] for line in lines] == ["BAD", "ok", "BAD", "BAD"]
    assert "not those that were written" in lines[0] and "no such file" in lines[2]
    code, out, _ = call("verify", taps, bad, "--json")
    assert code == 1 and [r["ok"] for r in json.loads(out)] == [True, False]


# ----------------------------------------------------------------------------------- the state of a run


@pytest.fixture(params=["now", "0.1"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run's state, as it is written now and as 0.1 wrote it."""
    golden = Path(__file__).parents[1] / "files/golden/run/quadrants.state"
    if request.param == "0.1":
        return golden
    record = store.load(golden)
    record.name = "quadrants"
    store.save(tmp_path / "quadrants.state", record)
    return tmp_path / "quadrants.state"


def test_inspect_and_verify_say_that_it_is_a_state(call, state: Path) -> None:
    code, out, _ = call("inspect", state)
    assert code == 0 and f"{state}: state of a training run" in out and "method" not in out and "layers" not in out
    assert "2 epochs done, 8 steps; to go on, train with the same settings and out" in out
    code, out, _ = call("inspect", state, "--json")
    facts = json.loads(out)
    assert code == 0 and (facts["kind"], facts["method"], facts["layers"]) == ("state", {}, [])
    code, out, _ = call("verify", state)
    assert code == 0 and f"{state}: state of a training run, " in out
    code, out, _ = call("verify", state, "--json")
    assert json.loads(out)[0]["kind"] == "state"


def test_inspect_of_somebody_elses_state(call, tmp_path: Path) -> None:
    store.save(tmp_path / "a.state", store.TaskFile(kind="state", parent="sha256:" + "0" * 64))
    code, out, _ = call("inspect", tmp_path / "a.state")
    assert code == 0 and "not of this package's trainer" in out


def test_a_state_is_no_task(call, folder: Path, state: Path, image: Path, tmp_path: Path) -> None:  # noqa: F811
    config = ["--config", folder / "c.toml"]
    words = (state.name, "expected a task file, got a state file", "train on with the same settings and out")
    refused(call("eval", state, *config), *words)
    refused(call("predict", state, image, *config), *words)
    refused(call("merge", state, *config, "--out", tmp_path / "m.safetensors"), *words)
    for command in ("estimate", "profile"):
        refused(call(command, "python:taps_ext.zoo.small_resnet", "--task", state), *words)


# ------------------------------------------------------------------------------------- env and selftest


def test_env(call) -> None:
    code, out, _ = call("env", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["extension"]["loaded"] == ops.HAS_EXTENSION
    code, out, _ = call("env")
    assert code == 0 and facts["torch"] in out


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the extension is not built")
@pytest.mark.parametrize(("built", "words"), [("90", "NO KERNELS"), ("80-real 90", ""), (None, "NO CUDA kernels")])
def test_env_says_that_a_device_has_no_kernels(call, monkeypatch: pytest.MonkeyPatch, built, words) -> None:
    """An A100 beside an extension for Hopper alone: what to install is said."""
    info = {**ops._C.build_info(), "cuda": built and {"version": "13.0", "architectures": built}}
    a100 = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(ops._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: a100)
    code, out, _ = call("env")
    assert code == 0 and "NVIDIA A100, 80 GiB, compute capability 8.0" in out and words in out
    assert ("TAPS_CUDA_ARCHITECTURES=80-real" in out) is bool(words)
    assert ("NO " in out) is bool(words)


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the extension is not built")
def test_selftest_passes(call) -> None:
    code, out, _ = call("selftest", "--json")
    result = json.loads(out)
    assert code == 0 and result["ok"], result
    code, out, _ = call("selftest")
    assert code == 0 and all(line.startswith("ok ") for line in out.splitlines())


def test_selftest_tells_what_fails(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_C", None)
    real = ops.gated_linear
    monkeypatch.setattr(ops, "gated_linear", lambda *a, **k: real(*a, **k) * 1.001)
    code, out, _ = call("selftest")
    assert code == 1 and "FAIL extension: the compiled extension is MISSING" in out
    assert "FAIL linear on cpu" in out and "relative error" in out
    assert "ok   conv2d on cpu" in out


def test_selftest_draws_nothing_from_the_callers_generator() -> None:
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    import argparse

    selftest.run(argparse.Namespace(json=True))
    assert torch.equal(torch.get_rng_state(), before)
