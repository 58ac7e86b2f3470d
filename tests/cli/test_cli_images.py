"""Images become a base's inputs as in its pretraining, and as in the task's training."""

import json
from pathlib import Path

import pytest
from test_cli import folder, refused  # noqa: F401  (fixtures)

from taps_ext import store
from taps_ext.cli.images import IMAGENET, statistics, stored_geometry
from taps_ext.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "model", "weights", "wanted"),
    [
        (None, "python:module.function", None, None),
        ("imagenet", "python:module.function", None, IMAGENET),
        ("none", "timm:resnet50", None, None),
        ([[0.5], [0.25]], "timm:resnet50", None, [[0.5], [0.25]]),
        (None, "timm:resnet50", "random", None),
        (None, "timm:resnet50", "file.safetensors", IMAGENET),
        ("base", "timm:vit_base_patch16_224.augreg_in21k", None, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
        (None, "torchvision:resnet18", None, IMAGENET),
        (None, "timm:no_such_model", None, None),
    ],
)
def test_statistics(setting, model, weights, wanted) -> None:
    scheme = model.partition(":")[0]
    if scheme != "python":
        pytest.importorskip(scheme)
    assert statistics(setting, {"model": model, "weights": weights}) == wanted


def test_a_name_that_means_nothing() -> None:
    with pytest.raises(ConfigError, match=r"data\.normalize: expected 'base', 'imagenet', 'none' .* got 'cifar'"):
        statistics("cifar", {"model": "timm:resnet50"})


def test_the_file_says_how_its_inputs_were_made(call, folder: Path) -> None:  # noqa: F811
    file, config = folder / "out/parity.taps", ["--config", folder / "c.toml"]
    wanted = {"channels": 1, "height": 16, "width": 16, "normalize": None}
    assert stored_geometry(store.load(file)) == wanted
    assert call("eval", file, *config)[0] == 0
    refused(call("eval", file, *config, "--size", 24), "trained on images with height 16, got 24")
    other = ["--set", "data.normalize=[[0.5],[0.5]]"]
    refused(call("eval", file, *config, *other), "trained on images with normalize None", "[[0.5], [0.5]]")


def test_predict_makes_images_as_training_did(call, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Without the task's data, and refusing another size."""
    image = pytest.importorskip("PIL.Image")
    image.new("L", (20, 20), 128).save(tmp_path / "grey.png")
    file = folder / "out/parity.taps"
    base = ["--base", "python:taps_ext.zoo.small_resnet", "--weights", folder / "base.safetensors"]
    base += ["--set", "base.args={widths=[8,16],blocks=1,stem_stride=2}"]
    code, out, err = call("predict", file, tmp_path / "grey.png", *base)
    assert (code, err) == (0, "") and ("even" in out or "odd" in out)
    for other in ("imagenet", "[[0.5],[0.5]]"):
        refused(
            call("predict", file, tmp_path / "grey.png", *base, "--set", f"data.normalize={other}"), "data.normalize"
        )
    wrong = call("predict", file, tmp_path / "grey.png", *base, "--size", 17)
    refused(wrong, f"data.size: {file} was trained with 16, got 17")


def test_eval_makes_images_as_training_did(call, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of a source whose images have another size, and with nothing said of theirs on the command line."""
    file = folder / "out/parity.taps"
    base = ["--base", "python:taps_ext.zoo.small_resnet", "--weights", folder / "base.safetensors"]
    base += ["--set", "base.args={widths=[8,16],blocks=1,stem_stride=2}", "--source", f"npz:{folder}/digits.npz"]
    code, out, err = call("eval", file, *base, "--json")
    assert (code, err) == (0, "")
    assert (
        json.loads(out)[0]["accuracy"]
        == json.loads(call("eval", file, "--config", folder / "c.toml", "--json")[1])[0]["accuracy"]
    )
    refused(call("eval", file, *base, "--size", 8), "trained on images with height 16, got 8")


def test_eval_normalises_as_training_did(call, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    other = ["data.normalize=[[0.5],[0.25]]", f"train.out={tmp_path}", "train.epochs=1"]
    assert call("train", folder / "c.toml", "--quiet", *other)[0] == 0
    assert stored_geometry(store.load(tmp_path / "parity.taps"))["normalize"] == [[0.5], [0.25]]
    assert call("eval", tmp_path / "parity.taps", "--config", folder / "c.toml")[0] == 0
