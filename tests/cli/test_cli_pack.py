"""`taps pack`, `unpack` and `diff`, and what `inspect` says of a packed file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import folder, refused  # noqa: F401  (fixtures)

from taps_ext import store


@pytest.fixture
def taps(folder: Path) -> Path:  # noqa: F811
    return folder / "out/parity.taps"


def test_pack_unpack_diff_without_a_base(call, taps: Path, tmp_path: Path) -> None:
    code, out, _ = call("pack", taps, "--codec", "int8", "--out", tmp_path / "int8.taps", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["file"] == str(tmp_path / "int8.taps") and "accuracy" not in facts
    assert facts["written"] == (tmp_path / "int8.taps").stat().st_size
    rows = {row["layer"]: row for row in facts["rows"]}
    opened = [layer for layer in json.loads(call("inspect", taps, "--json")[1])["layers"] if layer["open"]]
    assert {*rows} == {layer["layer"] for layer in opened}
    assert facts["before"] == sum(layer["bytes"] for layer in opened) and 0.25 < facts["bytes"] / facts["before"] < 0.3
    code, out, _ = call("diff", taps, tmp_path / "int8.taps", "--json")
    found = json.loads(out)
    assert code == 0 and found["same_parent"]
    changed = {part["part"]: part for part in found["parts"] if part["what"] != "same"}
    assert {*changed} == {*rows}
    for name, part in changed.items():
        assert part["distance"] == pytest.approx(rows[name]["error"], rel=1e-9)
        assert (part["what"], part["kinds"]) == ("changed", ["dense", "int8"])
    code, out, _ = call("unpack", tmp_path / "int8.taps", "--out", tmp_path / "back.taps", "--json")
    assert code == 0 and {*json.loads(out)["layers"]} == {*rows}
    code, out, _ = call("diff", tmp_path / "int8.taps", tmp_path / "back.taps")
    assert code == 0 and out.startswith("0 of ")
    assert call("verify", tmp_path / "int8.taps", tmp_path / "back.taps")[0] == 0


def test_pack_in_words(call, taps: Path, tmp_path: Path) -> None:
    code, out, _ = call("pack", taps, "--max-error", "0.2", "--out", tmp_path / "a.taps")
    assert code == 0 and "int4" in out and "bytes of open layers in" in out and f"{tmp_path / 'a.taps'}: " in out
    code, out, _ = call("diff", taps, tmp_path / "a.taps")
    assert code == 0 and "changed" in out and "int4" in out and " parts differ" in out
    code, out, _ = call("unpack", tmp_path / "a.taps", "--out", tmp_path / "b.taps")
    assert code == 0 and "layers unpacked" in out
    code, out, _ = call("pack", taps, "--out", tmp_path / "c.taps")
    assert code == 0 and "dense" in out and "(1.000x)" in out and "nothing to unpack" in out
    smallest = json.loads(call("pack", taps, "--codec", "sign", "--out", tmp_path / "s.taps", "--json")[1])["bytes"]
    code, out, _ = call("pack", taps, "--budget", str(2 * smallest), "--out", tmp_path / "d.taps", "--json")
    assert code == 0 and json.loads(out)["bytes"] <= 2 * smallest


def test_inspect_shows_codecs_and_errors(call, taps: Path, tmp_path: Path) -> None:
    assert "error" not in call("inspect", taps)[1]
    assert all("error" not in layer for layer in json.loads(call("inspect", taps, "--json")[1])["layers"])
    rows = json.loads(call("pack", taps, "--codec", "int4", "--out", tmp_path / "a.taps", "--json")[1])["rows"]
    layers = {
        layer["layer"]: layer for layer in json.loads(call("inspect", tmp_path / "a.taps", "--json")[1])["layers"]
    }
    for row in rows:
        layer = layers[row["layer"]]
        assert (layer["change"], layer["error"], layer["bytes"]) == ("int4", row["error"], row["bytes"])
    code, out, _ = call("inspect", tmp_path / "a.taps")
    assert code == 0 and "int4" in out and f"{rows[0]['error']:.2e}" in out and "error" in out


def test_pack_on_data(call, folder: Path, taps: Path, tmp_path: Path) -> None:  # noqa: F811
    config = ["--config", folder / "c.toml", "--out", tmp_path / "a.taps"]
    code, out, err = call("pack", taps, "--codec", "int8", "--split", "test", *config, "--json")
    facts = json.loads(out)
    assert code == 0, err
    assert facts["samples"] == 80 and all(row["output_error"] is not None for row in facts["rows"])
    known = store.read_header(taps).metadata
    assert facts["accuracy_before"] == pytest.approx(known.metrics["test"]["accuracy"])  # type: ignore[index]
    assert 1 - abs(facts["accuracy"] - facts["accuracy_before"]) >= facts["agreement"] - 1e-12
    now = store.read_header(tmp_path / "a.taps").metadata
    for name in ("name", "method", "parent", "labels", "metrics", "extra"):
        assert getattr(now, name) == getattr(known, name)
    measured = json.loads(call("eval", tmp_path / "a.taps", "--config", folder / "c.toml", "--json")[1])
    assert measured[0]["accuracy"] == pytest.approx(facts["accuracy"])
    layers = json.loads(call("inspect", tmp_path / "a.taps", "--json")[1])["layers"]
    errors = {row["layer"]: row["output_error"] for row in facts["rows"]}
    assert {layer["layer"]: layer["output_error"] for layer in layers if "output_error" in layer} == errors
    code, out, _ = call("pack", taps, "--max-error", "0.1", *config)
    assert code == 0 and "of outputs" in out and "the same answer for" in out and "% before" in out


def test_mistakes(call, folder: Path, taps: Path, tmp_path: Path) -> None:  # noqa: F811
    out = ["--out", tmp_path / "a.taps"]
    refused(call("pack", taps, "--codec", "int9", *out), "codec", "did you mean 'int")
    refused(call("pack", taps, "--codec", "int8", "--budget", "5", *out), "--budget", "not allowed with")
    refused(call("pack", taps, "--max-error", "much", *out), "--max-error", "expected a number")
    refused(call("pack", taps, "--budget", "5", *out), "budget: expected at least")
    refused(call("pack", taps, "--codec", "int8"), "--out")
    refused(call("pack", taps, "--out", taps), "out: expected a file of its own")
    refused(call("unpack", taps, *out), "expected a packed task")
    refused(call("diff", taps, tmp_path / "none.taps"), "none.taps", "no such file")
    refused(call("diff", taps, folder / "base.safetensors"), "base.safetensors")
    state = Path(__file__).parents[1] / "files/golden/run/quadrants.state"
    refused(call("pack", state, *out), "expected a task file, got a state file")
    refused(call("pack", taps, "--config", folder / "c.toml", "--task", "partiy", *out), "did you mean 'parity'")
    assert call("pack", taps, "--codec", "int8", *out)[0] == 0
    refused(call("pack", tmp_path / "a.taps", "--out", tmp_path / "b.taps"), "is packed already; `taps unpack` first")
    refused(call("unpack", tmp_path / "a.taps", "--out", tmp_path / "a.taps"), "out: expected a file of its own")
    assert not (tmp_path / "b.taps").exists()
