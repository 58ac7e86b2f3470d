"""`taps patch`: each action as it should go, and each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused

import taps_ext
from taps_ext import patch
from taps_ext.cli import main


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """a -> b -> c, and the patches between them."""
    states = [{"w": torch.zeros(30, 40), "b": torch.arange(5.0)}]
    for step in (1.0, 2.0):
        states.append({"w": states[-1]["w"].clone(), "b": states[-1]["b"]})
        states[-1]["w"][::7, 3] = step
    for name, state in zip("abc", states, strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    patch.diff(states[0], states[1], out=tmp_path / "ab.tapspatch")
    patch.diff(states[1], states[2], out=tmp_path / "bc.tapspatch")
    return tmp_path


def test_diff_and_apply(call, files: Path) -> None:
    made = files / "made.tapspatch"
    code, out, err = call("patch", "diff", files / "a.safetensors", files / "b.safetensors", "-o", made)
    assert (code, err) == (0, "") and "1 of 2 tensors, 5 elements" in out
    assert made.read_bytes() == (files / "ab.tapspatch").read_bytes()
    code, out, _ = call("patch", "diff", files / "a.safetensors", files / "c.safetensors", "-o", made, "--json")
    facts = json.loads(out)
    assert code == 0 and (facts["tensors_changed"], facts["elements_changed"]) == (1, 5)
    before = (files / "a.safetensors").read_bytes()
    chain = [files / "ab.tapspatch", files / "bc.tapspatch"]
    code, out, _ = call("patch", "--json", "apply", files / "a.safetensors", *chain, "--out", files / "x.safetensors")
    assert code == 0 and json.loads(out)["after"] == facts["after"] == patch.digest(files / "c.safetensors")
    assert (files / "a.safetensors").read_bytes() == before
    code, out, _ = call("patch", "apply", files / "a.safetensors", made, "--verify", "touched")
    assert code == 0 and facts["after"] in out
    for name in "ax":
        assert torch.equal(load_file(files / f"{name}.safetensors")["w"], load_file(files / "c.safetensors")["w"])


def test_tensors_that_go_and_come_are_counted(call, files: Path) -> None:
    state = load_file(files / "a.safetensors")
    save_file({"w": state["w"], "x": state["w"] + 1, "y": state["w"] + 2}, files / "odd.safetensors")
    a, odd, made = files / "a.safetensors", files / "odd.safetensors", files / "odd.tapspatch"
    code, out, _ = call("patch", "diff", a, odd, "-o", made)
    assert code == 0 and "3 of 4 tensors, 1 removed, 2 added, 2,400 elements" in out
    assert "3 of 4 tensors change, 1 removed, 2 added, 2,400 elements" in call("patch", "inspect", made)[1]
    facts = json.loads(call("patch", "inspect", made, "--json")[1])
    assert (facts["tensors_removed"], facts["tensors_added"]) == (1, 2)
    code, out, _ = call("patch", "apply", a, made, "--out", files / "x.safetensors")
    assert code == 0 and "3 tensors, 1 removed, 2 added, 2,400 elements written" in out
    done = json.loads(call("patch", "apply", a, made, "--json")[1])
    assert (done["removed"], done["added"]) == (1, 2) and load_file(a).keys() == {"w", "x", "y"}
    for action in (("inspect", files / "ab.tapspatch"), ("apply", files / "b.safetensors", files / "bc.tapspatch")):
        assert "removed" not in call("patch", *action)[1]


def test_out_is_of_the_kind_of_the_checkpoint(call, files: Path) -> None:
    folder = files / "model"
    folder.mkdir()
    save_file(load_file(files / "a.safetensors"), folder / "model.safetensors")
    there = sorted(files.rglob("*"))
    for name in ("x.safetensors", "x.safetensors.index.json"):
        words = ("out: expected a new folder for a checkpoint of several files", "a file's name")
        refused(call("patch", "apply", folder, files / "ab.tapspatch", "--out", files / name), *words)
    words = ("out: expected a file for a checkpoint of one file", "which names a folder")
    refused(call("patch", "apply", files / "a.safetensors", files / "ab.tapspatch", "--out", f"{files}/new/"), *words)
    assert sorted(files.rglob("*")) == there


def test_what_is_not_copied_is_said(call, files: Path) -> None:
    folder, ab = files / "model", files / "ab.tapspatch"
    folder.mkdir()
    save_file(load_file(files / "a.safetensors"), folder / "part.safetensors")
    places = dict.fromkeys(("b", "w"), "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert "not part of" not in call("patch", "apply", folder, ab, "--out", files / "n0")[1]
    (folder / "config.json").write_text("{}")
    out = call("patch", "apply", folder, ab, "--out", folder / "inside")[1]  # the new folder was not there to be copied
    assert "config.json is not part of the checkpoint and was not copied" in out
    for name in (".gitattributes", "README.md"):
        (folder / name).write_text("")
    out = call("patch", "apply", folder, ab, "--out", files / "n2")[1]
    assert "config.json and 3 more are not part of the checkpoint and were not copied" in out
    assert sorted(path.name for path in (files / "n2").iterdir()) == [index.name, "part.safetensors"]
    done = json.loads(call("patch", "apply", index, ab, "--out", files / "n3", "--json")[1])
    assert done["not_copied"] == ["config.json", "README.md", "inside", ".gitattributes"]
    assert json.loads(call("patch", "apply", folder, ab, "--json")[1])["not_copied"] == []


def test_inspect(call, files: Path) -> None:
    code, out, _ = call("patch", "inspect", files / "ab.tapspatch")
    assert code == 0 and all(word in out for word in ("sha256:", "30x40", "gap8", "F32", "1 of 2 tensors"))
    code, out, _ = call("patch", "inspect", files / "ab.tapspatch", "--json")
    assert code == 0 and json.loads(out)["changes"] == [
        {"tensor": "w", "change": "changed", "dtype": "F32", "shape": [30, 40], "elements": 5, "coding": "gap8"}
        | {"bytes": 5 * 4 + 9}
    ]
    state = load_file(files / "a.safetensors")
    patch.diff(state, {"w": state["w"].half(), "new": state["b"]}, out=files / "odd.tapspatch")
    code, out, _ = call("patch", "inspect", files / "odd.tapspatch", "--json")
    assert {c["tensor"]: c["change"] for c in json.loads(out)["changes"]} == {
        "b": "removed",
        "new": "added",
        "w": "reshaped",
    }
    assert call("patch", "inspect", files / "odd.tapspatch")[0] == 0


def test_verify(call, files: Path) -> None:
    checkpoints = [files / f"{name}.safetensors" for name in "abc"]
    code, out, _ = call("patch", "verify", files / "ab.tapspatch", checkpoints[0])
    assert code == 0 and [line[:2] for line in out.splitlines()] == ["ok", "ok"]
    code, out, _ = call("patch", "verify", files / "ab.tapspatch", *checkpoints, files / "d.safetensors", "--json")
    found = json.loads(out)
    assert code == 1 and [r["ok"] for r in found] == [True, True, False, False, False]
    assert [r.get("at") for r in found] == [None, "before", "after", "elsewhere", None]
    assert found[2]["reason"] == "the patch is applied already" and found[4]["reason"] == "no such file"
    raw = bytearray((files / "ab.tapspatch").read_bytes())
    raw[-1] ^= 1
    (files / "bad.tapspatch").write_bytes(raw)
    code, out, _ = call("patch", "verify", files / "bad.tapspatch", checkpoints[0])
    assert code == 1 and out.startswith("BAD") and len(out.splitlines()) == 1


def test_refusals(call, files: Path) -> None:
    a, ab, bc = files / "a.safetensors", files / "ab.tapspatch", files / "bc.tapspatch"
    before = a.read_bytes()
    refused(call("patch", "apply", a, bc), "a.safetensors", "'w'", "does not hold what the patch begins with")
    refused(call("patch", "apply", files / "b.safetensors", ab), "already applied")
    refused(call("patch", "apply", a, bc, ab), "the right order is", "ab.tapspatch")
    refused(call("patch", "apply", a, a), "taps.patch")
    refused(call("patch", "apply", a, files / "none.tapspatch"), "none.tapspatch", "no such file")
    refused(call("patch", "diff", a, files / "b.safetensors", "-o", a), "out: expected a file of its own")
    refused(call("patch", "apply", a, ab, "--out", a), "out: expected a place of its own", "leave --out away")
    refused(call("patch", "apply", a, ab, "--out", ab), "out: expected a file of its own", "which is read")
    refused(call("patch", "diff", a, ab, "-o", files / "x"), "ab.tapspatch", "taps.patch", "plain checkpoint")
    refused(call("patch", "diff", a, a), "-o")
    refused(call("patch", "inspect", a), "a.safetensors", "taps.patch")
    refused(call("patch", "join"), "join")
    refused(call("patch"), "ACTION")
    assert a.read_bytes() == before


@pytest.mark.parametrize("action", ["list", "verify", "remove"])
def test_a_task_folder_that_is_none(call, files: Path, action: str) -> None:
    names = ["birds"] if action == "remove" else []
    none = call("folder", action, files / "none", *names)
    refused(none, "DIR: expected a folder", "which is not there; taps folder add makes it")
    file = call("folder", action, files / "a.safetensors", *names)
    refused(file, "DIR: expected a folder", "a.safetensors, which is none")
    assert "create" not in none[2] + file[2] and "makes it" not in file[2] and not (files / "none").exists()


def test_a_task_that_is_in_the_folder(call, tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).eval()
    model = taps_ext.TaskModel(base, taps_ext.TapsConfig(lam=0.1))
    model.add_task("birds", num_classes=3)
    model.save_task("birds", tmp_path / "birds.taps")
    assert call("folder", "add", tmp_path / "tasks", tmp_path / "birds.taps")[0] == 0
    again = call("folder", "add", tmp_path / "tasks", tmp_path / "birds.taps")
    refused(again, "name: 'birds' is in", "already; --replace replaces it")
    assert "replace=True" not in again[2]
    assert call("folder", "add", tmp_path / "tasks", tmp_path / "birds.taps", "--replace")[0] == 0


@pytest.mark.parametrize("action", ["diff", "apply", "inspect", "verify"])
def test_help_of_the_actions(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["patch", action, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"taps patch {action}" in out.split("example:")[1] and "--json" in out
