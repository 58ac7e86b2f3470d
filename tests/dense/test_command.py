"""The commands on maps: train, eval, predict, compare."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from taps_ext import TaskModel
from taps_ext.cli.config import load_config
from taps_ext.cli.dense import dense_tasks
from taps_ext.dense import MeanIoU

Image = pytest.importorskip("PIL.Image")
CONFIG = """
[base]
model = "python:taps_ext.zoo.small_resnet"
num_classes = 10
args = { channels = 3, widths = [6, 8, 10], blocks = 1, stem_stride = 2 }
[data]
size = [24, 32]
[method]
method = "probe"
[train]
epochs = 1
batch_size = 4
lr = 0.05
out = "runs"
[tasks.classes]
source = "dense:data"
kind = "segmentation"
classes = ["dark", "bright"]
ignore = [9]
weights = "balanced"
[tasks.outlines]
source = "dense:data"
kind = "boundaries"
ignore = [9]
decoder = { kind = "concat", widths = [3, 4] }
[tasks.far]
source = "dense:data"
kind = "distance"
limit = 6
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3), ("test", 3)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for place in range(count):
            labels = np.kron(generator.integers(0, 2, (3, 4)), np.ones((8, 8))).astype(np.uint8)
            labels[:2] = 9
            image = np.stack([labels * 200, 100 - labels, labels * 0 + 30], -1).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / split / "images" / f"{split}{place}.png")
            Image.fromarray(labels).save(tmp_path / "data" / split / "labels" / f"{split}{place}.png")
    file = tmp_path / "maps.toml"
    file.write_text(CONFIG)
    return file


def test_train_eval_and_predict(config: Path, call) -> None:
    folder = config.parent
    code, out, err = call("train", config, "--mode", "joint", "--quiet", "--json")
    assert code == 0, err
    found = json.loads(out)["tasks"]
    assert [list(entry["test"])[1] for entry in found.values()] == ["miou", "f", "rmse"]

    files = [folder / "runs" / f"{name}.taps" for name in found]
    code, out, err = call("eval", *files, "--config", config, "--json")
    assert code == 0, err
    for entry, row in zip(found.values(), json.loads(out), strict=True):
        for key, value in entry["test"].items():
            assert row[key] == value  # what was trained is what is loaded
    code, out, _ = call("eval", files[0], "--config", config)
    assert f"miou {found['classes']['test']['miou']:.4f}" in out

    images = sorted((folder / "data" / "test" / "images").iterdir())
    code, out, err = call("predict", files[0], "--config", config, *images, "--out", folder / "maps", "--json")
    assert code == 0, err
    told = json.loads(out)
    model, settings = TaskModel(load_config(str(config)).base()), load_config(str(config))
    model.load_task(files[0])
    task = dense_tasks(settings, model.base, ["classes"])["classes"].task
    metric = MeanIoU(2)
    for index, one in enumerate(told["predictions"]):
        x, y = task.test[index]
        with torch.no_grad():
            outputs = model.eval()(x[None], task="classes")
        metric.update(outputs, y[None])
        share = float((outputs.argmax(1) == 1).float().mean())
        assert one["shares"].get("bright", 0.0) == pytest.approx(share, abs=1e-6)
        assert Image.open(one["picture"]).size == (32, 24)
    assert metric.compute() == pytest.approx(found["classes"]["test"]["miou"], abs=1e-12)

    packed = folder / "packed.taps"
    assert call("pack", files[0], "--codec", "bitmask", "--out", packed)[0] == 0
    code, _, err = call("pack", files[0], "--codec", "bitmask", "--out", packed, "--config", config)
    assert code == 2
    assert "got one of maps; pack without it" in err

    # a boundary is a pixel whose chance is above a half, whatever the loss weighed ones by
    code, out, err = call("predict", files[1], "--config", config, images[0], "--out", folder / "maps", "--json")
    assert code == 0, err
    outlines = dense_tasks(settings, model.base, ["outlines"])["outlines"].task
    model.load_task(files[1])
    with torch.no_grad():
        logits = model(outlines.test[0][0][None], task="outlines")[0, 0]
    share = float((logits > math.log(0.95 / 0.05)).float().mean())
    assert json.loads(out)["predictions"][0]["share"] == pytest.approx(share, abs=1e-6)

    # an image of the size of one tile is the same in tiles
    again = ["predict", files[2], "--config", config, images[0], "--out", folder / "maps", "--json"]
    whole, tiles = (json.loads(call(*again, *more)[1])["predictions"][0]["mean"] for more in ((), ("--tiles", 8)))
    assert whole == pytest.approx(tiles, abs=1e-5)
    code, out, err = call(
        "predict", files[0], images[0], "--out", folder / "maps", "--base", "python:taps_ext.zoo.small_resnet"
    )
    assert code == 2  # another base
    assert "belongs to another base" in err


def test_compare_by_delta_m(config: Path, call) -> None:
    first, rest = CONFIG.split("[tasks.outlines]")
    config.write_text(first + rest[rest.index("[tasks.far]") :])
    out = config.parent / "compared"
    command = ("compare", config, "--methods", "probe", "--seeds", "1", "--budget-trials", "1", "--out", out)
    code, text, err = call(*command, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["metric"] == "delta_m"
    told = {(row["task"], row["metric"], row["larger"]) for row in found["rows"]}
    assert told == {("classes", "miou", True), ("far", "rmse", False)}
    for row in found["rows"]:
        file = next((out / "probe" / row["task"]).rglob("*.result.json"))
        assert json.loads(file.read_text())["result"]["test"][row["metric"]] == row["test"]


@pytest.mark.parametrize(
    "change, message",
    [
        ("tasks.classes.kind='segment'", "tasks.classes.kind: expected one of .*did you mean 'segmentation'"),
        ("tasks.classes.classes=0", "tasks.classes.classes: expected names, or a number"),
        ("tasks.outlines.classes=3", "tasks.outlines.classes: expected none for boundaries"),
        ("tasks.outlines.weights='balanced'", "tasks.outlines.weights: expected a number"),
        ("tasks.classes.weights=[1.0]", "tasks.classes.weights: expected 'balanced' or 2 numbers"),
        ("tasks.far.decoder='heavy'", "tasks.far.decoder: expected one of .*got 'heavy'"),
        ("tasks.far.decoder={width='3'}", "tasks.far.decoder: width: expected an int"),
        ("tasks.far.num_classes=3", "tasks.far: unknown key 'num_classes'"),
        ("tasks.far.source='digits:plain'", "tasks.far: unknown key 'kind'"),
        ("base.taps=['stages.9']", "taps: the backbone has no module 'stages.9'"),
        ("data.size=[1, 2, 3]", "size: expected"),
        ("data.zoom=2", "data: unknown key 'zoom'"),
    ],
    ids=["kind", "count", "classes", "balanced", "weights", "decoder", "width", "key", "mixed", "taps", "size", "data"],
)
def test_mistakes_are_one_line(change: str, message: str, config: Path, call) -> None:
    code, _, err = call("train", config, change, "--quiet")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err), err


def test_serve_refuses_a_configuration_of_maps(config: Path, call) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    code, _, err = call("serve", config, config.parent)
    assert code == 2
    assert "expected tasks of classes" in err
