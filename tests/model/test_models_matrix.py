"""The model matrix on six small models, and that it tells what works from what does not (benchmarks/models.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")
pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARKS)
    import model_catalogue

    # Under a name of its own: the tests' helpers have a module `models`.
    spec = importlib.util.spec_from_file_location("benchmark_models", BENCHMARKS / "models.py")
    models = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
Entry = model_catalogue.Entry

SMOKE = (
    "by hand:unet",
    "by hand:lstm",
    "timm:vit_tiny_patch16_224",
    "transformers:GPT2LMHeadModel",
    "transformers:MixtralForCausalLM",
    "transformers:DetrForObjectDetection",
)


@pytest.mark.parametrize("name", SMOKE)
def test_it_works(name: str) -> None:
    (entry,) = [entry for entry in model_catalogue.MODELS if entry.name == name]
    row = models.check(entry)
    assert row["failed"] == {}
    assert row["outcome"] == "works" and row["layers"] > 0 and 0 < row["gated"] <= 1


def test_the_catalogue_has_each_model_once() -> None:
    names = [entry.name for entry in model_catalogue.MODELS]
    assert len(set(names)) == len(names) >= 120


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).tanh())


class Unasked(Small):
    """Its second layer's weight is used where nobody can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(6, 8)


class Raises(Small):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("no training today")
        return super().forward(x)


class Forgets(Small):
    """A weight of another base each time it is built: a file does not fit, nor does the plain model."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        Forgets.built += 1
        with torch.no_grad():
            self.body.weight.add_(Forgets.built)


def entry_of(build: type[nn.Module]) -> model_catalogue.Entry:
    return Entry(f"here:{build.__name__}", "test", build, model_catalogue.values(4, 6))


def test_outcomes() -> None:
    assert models.check(entry_of(Small))["outcome"] == "works"
    row = models.check(entry_of(Unasked))
    assert row["outcome"] == "refused" and row["remedied"] == {}, "and what the refusal asks for works"
    row = models.check(entry_of(Raises))
    assert row["outcome"] == "crashed" and row["failed"].keys() == {"files", "full"}
    assert row["failed"]["full"]["message"] == "RuntimeError: no training today"
    assert models.check(entry_of(Forgets))["failed"].keys() == {"files"}


@pytest.mark.parametrize("promise", ["exact", "closed", "files", "full"])
def test_what_is_wrong_is_called_so(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain model is given another value than the task."""
    made, replaced = models.plain_of, models.replace

    def off(entry: model_catalogue.Entry, model: nn.Module) -> tuple[nn.Module, dict[str, object]]:
        plain, stands = made(entry, model)
        with torch.no_grad():
            plain.body.weight[0, 0] += 1e-6
        return plain, stands

    def replaced_off(plain: nn.Module, *args: object) -> None:
        replaced(plain, *args)
        with torch.no_grad():
            plain.body.weight[0, 0] += 1e-6

    monkeypatch.setattr(models, "plain_of", off)
    monkeypatch.setattr(models, "replace", replaced_off)
    row = models.check(entry_of(Small))
    assert row["outcome"] == "wrong" and row["failed"][promise]["outcome"] == "wrong"


def test_the_run_is_resumed_and_tells(tmp_path, monkeypatch, capsys) -> None:
    """An exception in one model ends nothing; rows of the same code are not measured again; the exit code tells."""
    asked: list[str] = []
    check = models.check
    monkeypatch.setattr(models, "check", lambda entry: asked.append(entry.name) or check(entry))
    monkeypatch.setattr(models, "MODELS", tuple(map(entry_of, (Raises, Small))))
    (page := tmp_path / "models.md").write_text("# Models\n\n<!-- table: make models -->\nold\n<!-- end -->\nmore\n")

    def run(*args: str) -> int:
        files = ["--json", str(tmp_path / "models.json"), "--docs", str(page)]
        monkeypatch.setattr(sys, "argv", ["models.py", *files, *args])
        return models.main()

    assert run() == 1 and asked == ["here:Raises", "here:Small"]
    assert [row["outcome"] for row in json.loads((tmp_path / "models.json").read_text())] == ["crashed", "works"]
    text = page.read_text()
    assert "2 models: 1 works, 1 crashed." in text and "no training today" in text
    assert text.startswith("# Models\n") and text.endswith("<!-- end -->\nmore\n") and "old" not in text
    assert run("--only", "*Small") == 0 and len(asked) == 2
    assert run("--only", "*Small", "--again") == 0 and asked[2:] == ["here:Small"]
    with pytest.raises(SystemExit):
        run("--only", "Smal")
    assert "no model matches" in capsys.readouterr().err
