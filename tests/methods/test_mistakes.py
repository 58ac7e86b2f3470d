"""What authors and users of methods are told when something is not as it should be."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from method_cases import Tied
from models import TinyNet, settle
from torch import nn

from taps_ext import (
    ConfigError,
    LoraConfig,
    MethodConfig,
    ScaleBiasConfig,
    SeparateLayersConfig,
    TapsError,
    TaskModel,
)
from taps_ext.cli import main
from taps_ext.nn import convert, revert


@dataclass(frozen=True, kw_only=True)
class Given(MethodConfig):
    """A method of whatever it is given."""

    method = "given"
    made: object = None

    def parts(self, base):
        return self.made


def test_a_method_without_a_name_is_refused_before_a_file_would_need_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unnamed(MethodConfig):
        def parts(self, base):
            return base.own(base.norms)

    message = (
        r'config: expected a method that has a name, got Unnamed; decorate its class by @register_method\("a name"\)'
    )
    with pytest.raises(ConfigError, match=message):
        TaskModel(settle(TinyNet()), Unnamed()).add_task("t", num_classes=2)
    with pytest.raises(ConfigError, match=message):
        TaskModel(settle(TinyNet())).add_task("t", num_classes=2, config=Unnamed())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "method 'given': parts: expected a dictionary, got NoneType"),
        ([1], "method 'given': parts: expected a dictionary, got list"),
        ({"hidden": 3}, r"method 'given': parts\['hidden'\]: expected a Part, got int"),
        ({"hidden": nn.Linear(2, 2)}, r"method 'given': parts\['hidden'\]: expected a Part, got Linear"),
    ],
)
def test_a_method_that_makes_no_parts(made, message) -> None:
    model = TaskModel(settle(TinyNet()))
    with pytest.raises(ConfigError, match=message):
        model.add_task("t", num_classes=2, config=Given(made=made))
    assert model.tasks == []


def test_a_method_without_parts() -> None:
    with pytest.raises(TapsError, match="MethodConfig: defines no parts, which every method must"):
        TaskModel(settle(TinyNet())).add_task("t", config=MethodConfig())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraConfig(threshold=0.3), "threshold: expected none without selective=True"),
        (lambda: LoraConfig(score_init=0.3), "score_init: expected none without selective=True"),
        (lambda: LoraConfig(lam=0.3), "lam: expected 0 without selective=True"),
        (lambda: SeparateLayersConfig(bottom=2, side="top"), "side: expected none without fraction"),
        (lambda: SeparateLayersConfig(), "expected one of bottom, top, layers and fraction, got none"),
        (lambda: SeparateLayersConfig(bottom=1, top=1), r"got \['bottom', 'top'\]"),
        (lambda: SeparateLayersConfig(bottom=1, joint=1), "joint: expected True or False, got 1"),
        (lambda: ScaleBiasConfig(simultaneous="no"), "simultaneous: expected True or False, got 'no'"),
    ],
)
def test_settings_that_contradict_each_other(make, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_nothing_to_train_is_told() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False))
    model = TaskModel(bare, ScaleBiasConfig(last_layer=False))
    with pytest.warns(UserWarning, match="task 't': method 'scale-bias' finds nothing to train in this base"):
        model.add_task("t")


@pytest.mark.parametrize(("side", "layer"), [("bottom", "conv1"), ("top", "hidden")])
def test_a_fraction_that_chooses_nothing_is_told(side: str, layer: str) -> None:
    """And the one that it names chooses a layer."""
    model = TaskModel(settle(TinyNet()))
    with pytest.warns(UserWarning, match=f"fraction 0.01 chooses no layer from the {side}; the smallest") as told:
        model.add_task("none", config=SeparateLayersConfig(fraction=0.01, side=side))
    least = re.search(r"is ([\d.e-]+), which is (\w+)", str(told[0].message))
    total = sum(
        m.weight.numel() for n, m in model.base.named_modules() if n in ("conv1", "conv2", "depthwise", "hidden")
    )
    assert least[2] == layer
    assert 0 <= float(least[1]) - model.base.get_submodule(layer).weight.numel() / total < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_task("one", config=SeparateLayersConfig(fraction=float(least[1]), side=side))
        model.add_task("asked", config=SeparateLayersConfig(fraction=0.0, side=side))
    assert [row.layer for row in model.report("one").rows] == [layer] and not model.report("none").rows


def test_the_documented_method_that_shares() -> None:
    """What docs/methods.md says of it: a task on the base's head, a penalty on open Deltas alone, refused settings."""
    model = TaskModel(settle(TinyNet()), Tied(heads=False, pull=0.5))
    with pytest.raises(ConfigError, match="'tied' is set to run on the base's own head, got another"):
        model.add_task("t", num_classes=2)
    model.add_task("t")
    state = model.state("t")
    assert state.head is None and list(model.families) == ["tied"]
    with torch.no_grad():
        for name, score in (("conv1", 0.15), ("hidden", 0.05)):
            state.table[name].change.delta.fill_(0.25)
            state.table[name].gate.score.fill_(score)
        state.refresh()
    loss = model.sparsity_loss("t")
    want = 0.1 * (3 * 0.15 + 0.05) / 4 + 0.5 * 0.0625 * 8 * 3 * 9
    assert loss.item() == pytest.approx(want, rel=8 * torch.finfo(torch.float32).eps)
    loss.backward()
    assert state.table["hidden"].change.delta.grad is None and state.table["conv1"].change.delta.grad.any()
    for fraction in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"fraction: expected a number in \(0, 1\]"):
            Tied(fraction=fraction)


def test_a_converted_model_is_no_base() -> None:
    model = settle(TinyNet())
    convert(model, ["hidden"])
    with pytest.raises(ConfigError, match=r"base: hidden is a drop-in layer of its own; call taps_ext.nn.revert"):
        TaskModel(model)
    revert(model)
    TaskModel(model)
    with pytest.raises(ConfigError, match="patterns: expected at least one pattern, got none"):
        convert(settle(TinyNet()), [])
    with pytest.raises(ConfigError, match="model: expected a converted model, got a TaskModel"):
        revert(TaskModel(settle(TinyNet())))


CONFIG = """{imports}
[base]
model = "python:taps_ext.zoo.small_resnet"
num_classes = 10
args = {{ stem_stride = 4, blocks = 1 }}
[data]
size = 16
channels = 1
[method]
{method}
[train]
epochs = 1
batch_size = 256
warmup_epochs = 0
out = "out"
[tasks.plain]
source = "digits:plain"
"""

MODULE = """
import torch
from dataclasses import dataclass
from taps_ext import MethodConfig, register_method
from taps_ext.parts import Change, Gate, Layer, register_change

@register_change("doubling")
class Doubling(Change):
    def shapes(self, weight):
        return {"log": (1,)}

    def fold(self, weight):
        return (weight.float() * torch.exp2(self.log)).to(weight.dtype)

@register_method("doubling")
@dataclass(frozen=True, kw_only=True)
class DoublingConfig(MethodConfig):
    def parts(self, base):
        return {name: Layer(Gate(learn=False), Doubling(host)) for name, host in base.gated.items()}
"""


def test_a_method_of_ones_own_on_the_command_line(tmp_path, capsys) -> None:
    pytest.importorskip("sklearn", reason="the built-in sources need scikit-learn")
    (tmp_path / "doubling_method.py").write_text(MODULE)
    file = tmp_path / "own.toml"
    file.write_text(CONFIG.format(imports="", method='method = "doubling"'))
    assert main(["train", str(file), "--quiet"]) == 2
    assert "method: expected one of" in capsys.readouterr().err
    file.write_text(CONFIG.format(imports='imports = ["doubling_method"]', method='method = "doubling"'))
    assert main(["train", str(file), "--quiet", "--json"]) == 0
    assert main(["eval", str(tmp_path / "out" / "plain.taps"), "--config", str(file), "--json"]) == 0
    file.write_text(CONFIG.format(imports='imports = ["no_such_module"]', method='method = "doubling"'))
    assert main(["train", str(file), "--quiet"]) == 2
    assert "imports: no_such_module: No module named" in capsys.readouterr().err


def test_the_bases_own_head_on_the_command_line(tmp_path) -> None:
    pytest.importorskip("sklearn", reason="the built-in sources need scikit-learn")
    file = tmp_path / "head.toml"
    file.write_text(CONFIG.format(imports="", method='method = "scale-bias"\nlast_layer = false'))
    assert main(["train", str(file), "--quiet", "--json"]) == 0
    assert main(["inspect", str(tmp_path / "out" / "plain.taps")]) == 0
