"""`taps extract` and `taps merge`: between plain checkpoints and task files, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from test_cli import folder, refused  # noqa: F401  (fixtures)

from taps_ext import TaskModel, store
from taps_ext.files.checkpoint import same_bits
from taps_ext.zoo import SmallResNet


def model(classes: int = 10) -> SmallResNet:
    return SmallResNet(classes, widths=(8, 16), blocks=1, stem_stride=2).eval()


@pytest.fixture
def tuned(folder: Path) -> SmallResNet:  # noqa: F811
    """The base, trained on in every layer but the stem, with three classes."""
    torch.manual_seed(1)
    made = model(3)
    base = {k: v for k, v in store.read_safetensors(folder / "base.safetensors")[0].items() if not k.startswith("fc")}
    made.load_state_dict(base, strict=False)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if tensor.is_floating_point() and not name.startswith("stem"):
                tensor.mul_(1 + 0.1 * torch.randn_like(tensor))
    return made


@pytest.mark.parametrize("kind", ["safetensors", "pth", "inside a pth"])
def test_a_checkpoint_comes_back(call, folder: Path, tmp_path: Path, tuned, kind: str) -> None:  # noqa: F811
    source, extra = tmp_path / "tuned.pth", []
    if kind == "safetensors":
        source = tmp_path / "tuned.safetensors"
        store.write_safetensors(source, tuned.state_dict())
    elif kind == "pth":
        torch.save(tuned.state_dict(), source)
    else:
        torch.save({"epoch": 3, "state_dict": tuned.state_dict()}, source)
        extra = ["--key", "state_dict"]
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    file, back = tmp_path / "birds.taps", tmp_path / "back.safetensors"
    config = ["--config", folder / "c.toml"]
    labels = ["--labels", tmp_path / "labels.txt"]
    code, out, err = call("extract", source, *config, "--out", file, *extra, *labels, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["task"] == "birds" and facts["layers_open"] == facts["layers"] - 1  # all but the stem
    assert facts["as_weights"] + facts["as_deltas"] == facts["layers_open"] and facts["bytes"] == file.stat().st_size
    assert store.read_header(file).metadata.labels == ["a", "b", "c"]
    code, out, err = call("merge", file, *config, "--out", back)
    assert (code, err) == (0, "") and "back.safetensors" in out
    got, wanted = store.read_safetensors(back)[0], tuned.state_dict()
    assert set(got) == set(wanted) and all(same_bits(got[key], wanted[key]) for key in wanted)


def test_merging_a_trained_task(call, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The plain checkpoint gives the task's logits, bit for bit, without taps_ext."""
    file = folder / "out/parity.taps"
    config = ["--base", "python:taps_ext.zoo.small_resnet", "--weights", folder / "base.safetensors"]
    args = ["--set", "base.args={widths=[8,16],blocks=1,stem_stride=2}"]
    code, _, err = call("merge", file, *config, *args, "--out", tmp_path / "plain.safetensors")
    assert (code, err) == (0, "")
    plain, base = model(2), model()
    plain.load_state_dict(store.read_safetensors(tmp_path / "plain.safetensors")[0])
    base.load_state_dict(store.read_safetensors(folder / "base.safetensors")[0])
    adapted = TaskModel(base).eval()
    name = adapted.load_task(file)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert same_bits(adapted(x, task=name), plain(x))


def in_shards(path: Path, state: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    places = {name: f"m-{index % 2}.safetensors" for index, name in enumerate(state)}
    for file in set(places.values()):
        store.write_safetensors(path / file, {name: state[name] for name in state if places[name] == file})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path / "model.safetensors.index.json"


def test_checkpoints_in_shards_and_a_fraction(call, folder: Path, tmp_path: Path, tuned) -> None:  # noqa: F811
    """Of the base and of the fine-tuned model; what is kept of each layer is told, and is in the file."""
    base, _ = store.read_safetensors(folder / "base.safetensors")
    config = ["--config", folder / "c.toml"]
    sharded = [*config, "--weights", in_shards(tmp_path / "base", base)]
    source = tmp_path / "tuned.safetensors"
    store.write_safetensors(source, tuned.state_dict())
    index, file = in_shards(tmp_path / "tuned", tuned.state_dict()), tmp_path / "t.taps"
    assert call("extract", source, *config, "--out", tmp_path / "one.taps", "--name", "t")[0] == 0
    code, _, err = call("extract", index, *sharded, "--out", file)
    assert (code, err) == (0, "") and file.read_bytes() == (tmp_path / "one.taps").read_bytes()
    assert call("merge", file, *sharded, "--out", tmp_path / "back.safetensors")[0] == 0
    back = store.read_safetensors(tmp_path / "back.safetensors")[0]
    assert all(same_bits(back[key], tensor) for key, tensor in tuned.state_dict().items())
    code, out, err = call("extract", index.parent, *sharded, "--out", file, "--top-fraction", 0.1, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    rows = {row["layer"]: row for row in facts["packing"]["rows"]}
    assert len(rows) == facts["layers_open"] == facts["as_deltas"] and all(0.1 < r["error"] < 1 for r in rows.values())
    parts = store.read_header(file).metadata.parts
    assert {n: r["error"] for n, r in rows.items()} == {n: parts[n].facts["packed"]["error"] for n in rows}
    code, out, _ = call("extract", index, *sharded, "--out", file, "--top-fraction", "0.1")
    assert code == 0 and all(f"{row['error']:.2e}" in out for row in rows.values())
    refused(call("extract", index, *config, "--out", file, "--top-fraction", "2"), "top_fraction: expected a number in")
    refused(call("extract", index, *config, "--out", file, "--top-fraction", "x"), "expected a number in (0, 1]")
    refused(call("extract", index, *config, "--out", index.parent / "m-0.safetensors"), "expected a file of its own")


class Opened:
    """Unpickling this opens a file; nothing may."""

    def __reduce__(self):
        return open, ("/dev/null",)


def test_refusals(call, folder: Path, tmp_path: Path, tuned) -> None:  # noqa: F811
    config, out = ["--config", folder / "c.toml"], tmp_path / "t.taps"
    wrapped, code_in_it, empty = tmp_path / "wrapped.pth", tmp_path / "code.pth", tmp_path / "empty.pth"
    torch.save({"epoch": 3, "model": tuned.state_dict()}, wrapped)
    torch.save({"w": Opened()}, code_in_it)
    empty.touch()
    refused(call("extract", wrapped, *config, "--out", out), "expected tensors by name", "['model'] with --key")
    refused(call("extract", wrapped, *config, "--out", out, "--key", "ema"), "key: expected one of ['model']", "'ema'")
    refused(call("extract", code_in_it, *config, "--out", out), "expected tensors by name alone", "open", "not run")
    torch.save(tuned, code_in_it)  # not its tensors
    refused(call("extract", code_in_it, *config, "--out", out), "got 'taps_ext.zoo.SmallResNet'")
    refused(call("extract", empty, *config, "--out", out), "expected a file of tensors")
    refused(call("extract", tmp_path / "no.pth", *config, "--out", out), "no.pth", "No such file")
    plain = tmp_path / "plain.safetensors"
    store.write_safetensors(plain, {k: v for k, v in tuned.state_dict().items() if k != "bn.weight"})
    refused(call("extract", plain, *config, "--out", out), "has no 'bn.weight'")
    refused(call("extract", plain, *config, "--out", out, "--key", "model"), "key: expected none")
    store.write_safetensors(plain, tuned.state_dict())
    (tmp_path / "labels.txt").write_text("a\nb\n")
    labels = ["--labels", tmp_path / "labels.txt"]
    refused(call("extract", plain, *config, "--out", out, *labels), "expected 3 lines of text, got 2")
    refused(call("extract", plain, *config, "--out", out, "--exclude", "nothing*"), "'nothing*' matches no layer")
    refused(call("extract", plain, *config, "--out", tmp_path / "no" / "t.taps"), "no such folder")
    assert not out.exists()
    refused(call("merge", plain, *config, "--out", tmp_path / "m.safetensors"), "not a task file")
    refused(call("merge", folder / "out/parity.taps", "--out", tmp_path / "m.safetensors"), "--config", "--base")
    assert not (tmp_path / "m.safetensors").exists()


def test_what_is_read_is_not_written_over(call, folder: Path, tmp_path: Path, tuned) -> None:  # noqa: F811
    source, file = tmp_path / "tuned.safetensors", tmp_path / "birds.taps"
    store.write_safetensors(source, tuned.state_dict())
    config = ["--config", folder / "c.toml"]
    assert call("extract", source, *config, "--out", file)[0] == 0
    kept = {path: path.read_bytes() for path in (source, file, folder / "base.safetensors")}
    (tmp_path / "again.safetensors").symlink_to(folder / "base.safetensors")
    for words in (
        ("merge", file, *config, "--out", folder / "base.safetensors"),
        ("merge", file, *config, "--out", tmp_path / "again.safetensors"),
        ("merge", file, *config, "--out", file),
        ("extract", source, *config, "--out", source),
        ("extract", source, *config, "--out", folder / "base.safetensors"),
    ):
        code, _, err = call(*words)
        assert code == 2 and "out: expected a file of its own" in err
    assert all(path.read_bytes() == content for path, content in kept.items())
    refused(call("merge", file, *config, "--out", tmp_path / "plain.pth"), "out:", ".safetensors")
    assert not (tmp_path / "plain.pth").exists()


def test_a_text_file_is_no_checkpoint(call, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "x.pth").write_text("hello")
    code, _, err = call("extract", tmp_path / "x.pth", "--config", folder / "c.toml", "--out", tmp_path / "x.taps")
    assert code == 2 and "expected a file of tensors by torch.save" in err
