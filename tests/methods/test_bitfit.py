"""BitFit: all biases, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import adapted, images, make_base, output, state_of, train
from models import TinyNet, settle
from torch import Tensor, nn

from taps_ext import BitFitConfig, MethodConfig, TaskFileError, TaskModel, register_method, store
from taps_ext.methods import base as methods
from taps_ext.parts import Own, Part
from taps_ext.store.record import Record

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "biases"), [("resnet18", 4_800), ("resnet50", 26_560), ("mobilenet_v2", 17_056), ("vit_small", 51_456)]
)
def test_counts(name: str, biases: int, tmp_path: Path) -> None:
    """Every parameter of the base whose name ends in "bias", but for the head's; from `report` and the file's bytes."""
    base = timm.create_model("vit_small_patch16_224") if name == "vit_small" else getattr(torchvision.models, name)()
    model = TaskModel(base, BitFitConfig())
    model.add_task("t", num_classes=10)
    head = model.state("t").head_path
    named = {n: p.numel() for n, p in base.named_parameters() if n.endswith("bias") and not n.startswith(head)}
    report = model.report("t")
    assert sum(named.values()) == biases == report.norms + report.others
    assert report.parameters == biases + report.head and report.layers_open == report.bytes == 0
    model.save_task("t", tmp_path / "t.taps")
    found = {n.replace(":", "."): info.nbytes for n, info in store.read_header(tmp_path / "t.taps").tensors.items()}
    assert {n: size for n, size in found.items() if not n.startswith(head)} == {n: 4 * k for n, k in named.items()}


class Scaled(nn.Module):
    """A module with a bias and other tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_bias, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.q_bias + self.offset


def test_biases_of_other_modules() -> None:
    model = TaskModel(nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False), Scaled(), nn.Linear(3, 2)))
    model.add_task("t", config=BitFitConfig())
    own = model.state("t").table
    assert list(own) == ["2", "3"] and [n for n, _ in own["2"].named_parameters()] == ["q_bias"]
    assert not list(own["2"].buffers())
    x = torch.randn(4, 3)
    want = output(model, x)
    assert torch.equal(output(model, x, "t"), want)
    with torch.no_grad():
        own["2"].q_bias.add_(1.0)
    assert torch.equal(output(model.base[2], x), x + 1) and not torch.equal(output(model, x, "t"), want)


def test_scales_and_statistics_stay_the_bases() -> None:
    """In training, too: a norm runs on the base's statistics and updates none."""
    model, x = adapted("conv", "bitfit"), images("conv")
    before = state_of(model)
    train(model, x, "t")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    head = model.state("t").head_path
    assert changed and all(name.endswith("bias") or f"/{head}." in name for name in changed)
    model.train()
    in_training = output(model, x, "t")
    assert torch.equal(output(model.eval(), x, "t"), in_training)


def test_the_rest_of_a_norm_is_the_bases_at_any_time() -> None:
    """Also where other tensors take its place: what is assigned, and what `functional_call` runs on."""
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), BitFitConfig()).eval()
    model.add_task("t")
    x = torch.randn(3, 3, 8, 8)
    other = {name: torch.rand_like(tensor) for name, tensor in model.base.state_dict().items() if "bn1.weight" in name}
    want = output(model, x, "t")
    replaced = {f"base.{name}": tensor for name, tensor in other.items()}
    with torch.no_grad():
        called = torch.func.functional_call(model, replaced, (x,), {"task": "t"})
    assert torch.equal(output(model, x, "t"), want) and not torch.equal(called, want)
    model.load_state_dict({**model.state_dict(), **replaced}, assign=True)
    assert torch.equal(output(model, x, "t"), called)


@pytest.mark.parametrize(
    ("only", "problem"),
    [
        (["bios"], "only: expected names of parameters, 'bios' is none"),
        ([["bias"]], "unhashable"),
        ("bias", "only: expected a list"),
        (["bias", "weight"], "tensor 'norm.weight'"),
    ],
)
def test_a_record_that_does_not_fit(only: object, problem: str) -> None:
    host = nn.BatchNorm2d(4)
    record = Own(host, buffers=False, only=["bias"]).record(open=True)
    assert record.facts == {"kind": "own", "role": "norm", "buffers": False, "only": ["bias"]}
    bad = Record({**record.facts, "only": only}, record.tensors, module="norm", path="x.taps")
    with pytest.raises(TaskFileError, match=problem):
        Own.read(bad, host)


def test_a_file_with_more_than_its_methods_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where the method is known: its own part would hold other parameters."""

    class Wider(MethodConfig):
        def parts(self, base) -> dict[str, Part]:
            return base.own(base.norms, buffers=False)

    register_method("wider")(Wider)
    try:
        model = TaskModel(make_base("small"), BitFitConfig())
        model.add_task("t")
        model.save_task("t", tmp_path / "t.taps")
        file = store.load(tmp_path / "t.taps")
        file.parts = {name: record for name, record in file.parts.items() if name in ("norm", "fc")}
        file.method = Wider().to_dict()
        store.save(tmp_path / "other.taps", file)
        with pytest.raises(TaskFileError, match=r"part 'norm': only: expected None, got \['bias'\]"):
            TaskModel(make_base("small")).load_task(tmp_path / "other.taps")
    finally:
        monkeypatch.delitem(methods._METHODS, "wider")
