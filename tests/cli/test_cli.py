"""The commands, each once as it should go and once for each mistake that a user can make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from taps_ext import store
from taps_ext.cli import COMMANDS, main
from taps_ext.train.alone import alone
from taps_ext.zoo import SmallResNet

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

CONFIG = """
[base]
model = "python:taps_ext.zoo.small_resnet"
weights = "base.safetensors"
args = { widths = [8, 16], blocks = 1, stem_stride = 2 }

[data]
size = 16
channels = 1

[method]
method = "taps"
lam = 0.5

[train]
epochs = 2
batch_size = 32
warmup_epochs = 1
lr = 0.05
out = "out"

[tasks.parity]
source = "npz:digits.npz"

[tasks.probed]
source = "npz:digits.npz"
method = { method = "probe" }
"""


def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taps_ext", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a data set, a configuration, and the task files of a short training."""
    import numpy as np
    from sklearn.datasets import load_digits

    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    base = SmallResNet(widths=(8, 16), blocks=1, stem_stride=2)
    store.write_safetensors(path / "base.safetensors", base.state_dict())
    digits = load_digits()
    x, y = digits.images[:480] / 16, digits.target[:480] % 2
    splits = {"train": slice(0, 320), "val": slice(320, 400), "test": slice(400, 480)}
    arrays = {f"{k}_{s}": v[part] for s, part in splits.items() for k, v in (("x", x), ("y", y))}
    np.savez(path / "digits.npz", **arrays, classes=np.array(["even", "odd"]))
    (path / "c.toml").write_text(CONFIG)
    assert main(["train", str(path / "c.toml"), "--quiet", "--json"]) == 0
    return path


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says the words."""
    code, out, err = result
    lines = [line for line in err.splitlines() if not line.startswith("taps: warning:")]
    assert (code, out) == (2, "")
    assert len(lines) == 1 and lines[0].startswith("taps: error: "), err
    for word in words:
        assert word in lines[0]


# ------------------------------------------------------------------------------------------- in general


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_purpose_and_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"taps {command}" in out.split("example:")[1] and "--json" in out


def test_help_loads_no_optional_package() -> None:
    code = (
        "import sys; from taps_ext.cli import make_parser; make_parser();"
        "heavy = ('matplotlib', 'sklearn', 'timm', 'torchvision', 'rich', 'PIL');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_as_a_process() -> None:
    done = run("verify", "nowhere.taps", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)[0]["reason"] == "no such file"
    done = run("inspect", "nowhere.taps")
    refused((done.returncode, done.stdout, done.stderr), "nowhere.taps", "no such file")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["command", "'trian'", "did you mean 'train'"]),
        ([], ["COMMAND"]),
        (["train"], ["CONFIG.toml"]),
        (["demo", "--seed", "x"], ["--seed", "expected an int >= 0", "'x'"]),
        (["env", "--nope"], ["--nope"]),
        (["eval", "a.taps", "--split", "tset"], ["--split", "tset"]),
    ],
)
def test_bad_command_lines(call, args: list[str], words: list[str]) -> None:
    refused(call(*args), *words)


# ------------------------------------------------------------------------------------------------ train


def test_train_prints_a_table_and_json(call, folder: Path) -> None:
    code, out, err = call("train", folder / "c.toml", "--quiet")  # finished before: results are read back
    assert code == 0 and err == ""
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["parity", "probed"]
    code, out, _ = call("train", folder / "c.toml", "--quiet", "--json")
    report = json.loads(out)
    parity, probed = report["tasks"]["parity"], report["tasks"]["probed"]
    assert (parity["method"], probed["method"]) == ("taps", "probe")
    assert 0 <= parity["test"]["accuracy"] <= 1 and probed["layers_open"] == 0
    assert parity["bytes"] == Path(parity["file"]).stat().st_size
    assert Path(parity["file"]) == folder / "out" / "parity.taps"


def test_overrides_reach_the_settings(call, folder: Path, tmp_path: Path) -> None:
    args = ["train.epochs=1", f"train.out={tmp_path}", "method.lam=0", "train.optimizer=adamw"]
    code, out, err = call("train", folder / "c.toml", "--json", *args)
    assert code == 0, err
    assert json.loads(out)["out"] == str(tmp_path)
    assert "parity:" in err and "val_accuracy" in err
    method = store.read_header(tmp_path / "parity.taps").metadata.method
    assert method["lam"] == 0


def test_a_task_does_not_depend_on_the_others(call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.toml").write_text(CONFIG[: CONFIG.index("[tasks.parity]")].replace('"base', f'"{folder}/base'))
    added = [f'tasks.parity.source="npz:{folder}/digits.npz"', f"train.out={tmp_path}"]
    assert call("train", tmp_path / "alone.toml", "--quiet", *added)[0] == 0
    assert (tmp_path / "parity.taps").read_bytes() == (folder / "out/parity.taps").read_bytes()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nonsense", ["key=value", "'nonsense'"]),
        ("trian.lr=1", ["unknown section 'trian'", "did you mean 'train'"]),
        ("lr=0.1", ["unknown section 'lr'", "did you mean 'train.lr'?"]),
        ("epoch=1", ["did you mean 'train.epochs'?"]),
        ("lam=0.1", ["did you mean 'method.lam'?"]),
        ("seed=1", ["did you mean 'base.seed' or 'data.seed' or 'train.seed'?"]),
        ("train.lrr=1", ["unknown key 'lrr'", "did you mean 'lr'"]),
        ("train.lr=fast", ["lr: expected a number", "'fast'"]),
        ("train.betas=3", ["betas", "expected two numbers"]),
        ("train.betas=[0.9, 1.0]", ["betas", "expected numbers below 1"]),
        ("data.normalize=5", ["normalize", "(mean, std)"]),
        ("data.normalize=[0.5, 0.5]", ["normalize"]),
        ("method.overrides={'*' = {learn = 'x'}}", ["overrides['*'].learn", "True or False", "'x'"]),
        ("train.device=tpu9", ["device", "tpu9"]),
        ("train.lr.x=1", ["expected 'lr' to be a section"]),
        ("train=3", ["train: expected a section"]),
        ("method.lamb=1", ["unknown key 'lamb'", "did you mean 'lam'"]),
        ("method.method=tapps", ["did you mean 'taps'"]),
        ("method.exclude_modules=['nothing.*']", ["exclude_modules", "nothing.*"]),
        ("base.modle=1", ["unknown key 'modle'", "did you mean 'model'"]),
        ("base.model=resnet", ["base.model", "timm:NAME"]),
        ("base.model=timm:resnet19x", ["base.model", "resnet19x"]),
        ("base.model=torchvision:resnet19", ["base.model", "did you mean"]),
        ("base.model=python:nowhere.make", ["nowhere"]),
        ("base.model=python:json.dumps", ["base.model"]),
        ("base.args.widths=[8, 16, 32]", ["base.weights"]),
        ("base.args.color=1", ["base.model", "color"]),
        ("base.num_classes=7", ["base.weights", "fc.bias", "[7]", "[10]"]),
        ("base.weights=nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
        ("base.head_module=fcc", ["head_module", "did you mean 'fc'"]),
        ("data.channels=3", ["shape [3, 16, 16]", "data.channels"]),
        ("data.channels=2", ["channels"]),
        ("tasks.parity.source=digits:plian", ["digits:plian", "did you mean 'digits:plain'"]),
        ("tasks.parity.source=npz:nowhere.npz", ["nowhere.npz"]),
        ("tasks.parity.sauce=1", ["tasks.parity", "unknown key 'sauce'", "did you mean 'source'"]),
        ("tasks.parity.num_classes=1", ["num_classes", ">= 2"]),
        ("tasks.parity.method=5", ["tasks.parity.method"]),
        ("tasks.parity=5", ["tasks.parity"]),
        ("data=3", ["data: expected a section"]),
        ("base='timm:resnet18'", ["base: expected a section"]),
        ("base.head_module=5", ["base.head_module", "got 5"]),
        ("base.head_module=['fc', 5]", ["base.head_module", "['fc', 5]"]),
        ("base.head_module=['fc', 'fc']", ["head_module: expected each module once, got 'fc' again"]),
        ("train.out=5", ["train.out: expected a folder, got 5"]),
    ],
)
def test_bad_configurations(call, folder: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    refused(call("train", folder / "c.toml", f"train.out={tmp_path}", override), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[base", ["not valid TOML"]),
        ("[bass]\nx = 1", ["'bass'", "did you mean 'base'"]),
        ("", ["tasks.NAME"]),
    ],
)
def test_bad_files(call, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "c.toml").write_text(text)
    refused(call("train", tmp_path / "c.toml"), *words)
    refused(call("train", tmp_path / "none.toml"), "none.toml", "No such file")
    refused(call("train", tmp_path), "directory")


def test_base_without_weights_is_refused(call, folder: Path, tmp_path: Path) -> None:
    text = CONFIG.replace('model = "python:taps_ext.zoo.small_resnet"\nweights = "base.safetensors"', "")
    (tmp_path / "c.toml").write_text(text.replace("npz:", f"npz:{folder}/"))
    refused(
        call("train", tmp_path / "c.toml", "base.model=timm:resnet18", "base.args={}"),
        "base.weights",
        "random",
    )


def test_a_file_of_another_base_is_told_in_the_words_of_the_command_line(call, folder: Path) -> None:
    file, other = folder / "out/parity.taps", ["--set", "base.weights=random", "--set", "base.seed=1"]
    wrong = call("eval", file, "--config", folder / "c.toml", *other)
    refused(wrong, "belongs to another base", "name the architecture and weights", "--config", "--base and --weights")
    assert "allow_dtype_cast" not in wrong[2] and "shared=" not in wrong[2]


def test_an_archive_is_no_task_file(call, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "parity.zip", "w") as archive:
        archive.write(folder / "out/parity.taps", "parity.taps")
    for command in ("eval", "merge"):
        more = [] if command == "eval" else ["--out", tmp_path / "a.safetensors"]
        refused(
            call(command, tmp_path / "parity.zip", "--config", folder / "c.toml", *more), "parity.zip", "zip archive"
        )
    refused(call("inspect", tmp_path / "parity.zip"), "parity.zip", "zip archive")


def test_two_runs_in_one_folder(call, folder: Path, tmp_path: Path) -> None:
    with alone(tmp_path):
        busy = call("train", folder / "c.toml", f"train.out={tmp_path}")
    refused(busy, "out: expected a folder that no other run trains into", f"process {os.getpid()}")
    assert os.listdir(tmp_path) == []


def test_uint8_images_of_a_function(call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes_for_cli.py").write_text(
        "import torch\n"
        "class Bytes:\n"
        "    classes = ['even', 'odd']\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return torch.zeros(1, 16, 16, dtype=torch.uint8), i % 2\n"
        "def make(): return Bytes(), None, Bytes()\n"
    )
    text = CONFIG.replace("npz:digits.npz", "python:bytes_for_cli.make").replace('"base', f'"{folder}/base')
    (tmp_path / "c.toml").write_text(text)
    refused(call("train", tmp_path / "c.toml"), "images are torch.uint8", "x.float() / 255")


def test_a_module_beside_the_configuration(call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my_base_for_cli.py").write_text(
        "from taps_ext.zoo import small_resnet\n"
        "def make():\n    return small_resnet(widths=(8, 16), blocks=1, stem_stride=2)\n"
    )
    text = CONFIG.replace("args = {", "# ").replace("python:taps_ext.zoo.small_resnet", "python:my_base_for_cli.make")
    (tmp_path / "c.toml").write_text(text.replace('"base', f'"{folder}/base').replace("npz:", f"npz:{folder}/"))
    code, out, err = call("eval", folder / "out/parity.taps", "--config", tmp_path / "c.toml", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["samples"] == 80


def test_a_module_in_the_current_folder(tmp_path: Path) -> None:
    """For the installed command, whose `sys.path` begins with the folder that it is in."""
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(4, 2)\n")
    command = "import sys; del sys.path[0]; from taps_ext.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", command, "profile", "python:mine.make", "--shape", "4", "--batch", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_interrupted_training_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle, then again the same command: the same file as without the interruption."""
    args = ["train", folder / "c.toml", "train.epochs=8", "--json"]
    whole = run(*args, f"train.out={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    again = [*args, f"train.out={tmp_path}/cut"]
    child = subprocess.Popen(
        [sys.executable, "-m", "taps_ext", *map(str, again)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    metrics = tmp_path / "cut/metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130 and out == "", err
    assert "run it again to go on" in err.splitlines()[-1] and "Traceback" not in err
    assert (tmp_path / "cut/parity.state").exists()
    rest = run(*again)
    assert rest.returncode == 0, rest.stderr
    for name in ("parity", "probed"):
        assert (tmp_path / f"cut/{name}.taps").read_bytes() == (tmp_path / f"whole/{name}.taps").read_bytes()
