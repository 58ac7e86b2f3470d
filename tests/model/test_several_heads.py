"""Bases with several classifiers: named where nobody said which a head replaces, or each with a head of the task's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import ConfigError, FullConfig, JointTapsConfig, ProbeConfig, TapsConfig, TaskModel
from taps_ext.base.classifiers import classifiers
from taps_ext.files.checkpoint import same_bits


class Distilled(nn.Module):
    """Averages two classifiers, as distilled transformers do."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.head, self.head_dist = nn.Linear(12, classes), nn.Linear(12, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.body(x)))
        return (self.head(x) + self.head_dist(x)) / 2


def distilled() -> Distilled:
    torch.manual_seed(0)
    return Distilled().eval()


BOTH = ["head", "head_dist"]
CONFIGS = [ProbeConfig(), TapsConfig(lam=0.1), FullConfig(), JointTapsConfig(lam=0.1)]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)


@pytest.mark.parametrize("classes", [None, 3, 5])
@every_config
def test_a_task_that_says_nothing_of_a_second_classifier_is_refused(config, classes: int | None) -> None:
    model = TaskModel(distilled(), config)
    message = r"head_module: head and head_dist look like classifiers .* head_module=\['head', 'head_dist'\]"
    with pytest.raises(ConfigError, match=message):
        model.add_task("t", num_classes=classes)
    with pytest.raises(ConfigError, match=message):
        model.add_task("t", head=nn.Linear(12, 3))
    assert model.tasks == [] and not model.families


@pytest.mark.parametrize("where", ["model", "task"])
def test_one_head_where_that_is_what_was_said(where: str) -> None:
    said = {"head_module": "head"}
    model = TaskModel(distilled(), TapsConfig(lam=0.1), **(said if where == "model" else {}))
    model.add_task("t", num_classes=5, **(said if where == "task" else {}))
    assert [row.layer for row in model.report("t").rows] == ["body", "head_dist"]


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("where", ["model", "task"])
@every_config
def test_a_head_in_the_place_of_each(config, where: str, classes: int | None, tmp_path) -> None:
    """Trained, saved, loaded, merged and unloaded."""
    said, base, x = {"head_module": BOTH}, distilled(), torch.randn(6, 8)
    model = TaskModel(base, config, **(said if where == "model" or config.method == "joint-taps" else {}))
    model.add_task("t", num_classes=classes, **(said if where == "task" else {}))
    assert [row.layer for row in model.report("t").rows if row.layer in BOTH] == []
    group = {g["name"]: g for g in model.parameter_groups("t", lr=0.1, weight_decay=0.01)}["head"]
    assert len(group["params"]) == 3 and group["weight_decay"] == 0.01
    optimizer = torch.optim.SGD([group])
    before = [p.detach().clone() for p in group["params"]]
    model.train()(x, task="t").square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(group["params"], before, strict=True))
    model.eval()
    with torch.no_grad():
        want = model(x, task="t")
        assert want.shape == (6, classes or 5) and same_bits(model(x, task=None), distilled()(x))
        if model.families:
            model.save_shared(config.family, tmp_path / "family.taps")
        model.save_task("t", tmp_path / "t.taps", labels=[str(i) for i in range(classes or 5)])
        fresh = TaskModel(distilled(), **(said if model.families else {})).eval()
        fresh.load_task(tmp_path / "t.taps")
        assert same_bits(fresh(x, task="t"), want)
        model.reload_task("t", tmp_path / "t.taps")
        assert same_bits(model(x, task="t"), want)
        model.merge_file(tmp_path / "t.taps", tmp_path / "plain.safetensors")
        plain = copy.deepcopy(model).merge_and_unload("t")
        assert same_bits(plain(x), want) and type(plain.head_dist) is nn.Linear
        assert model.task_state_dict("t").keys() == base.state_dict().keys()
        assert same_bits(model.unload()(x), distilled()(x))


def test_a_module_that_is_no_head() -> None:
    base = distilled()
    for said, message in (
        (["head", "head"], "expected each module once, got 'head' again"),
        (["head", "norm"], "expected linear layers where there are several, got 'norm', a LayerNorm"),
        (["head", None], "expected a module's name such as 'fc', got ''"),
        (["head", "haed"], "no module 'haed' .did you mean 'head'"),
    ):
        with pytest.raises(ConfigError, match=f"^head_module: .*{message}"):
            TaskModel(base, head_module=said)
    model = TaskModel(base, ProbeConfig(), head_module=BOTH)
    with pytest.raises(ConfigError, match="head: expected num_classes, which makes a head for each of"):
        model.add_task("t", head=nn.Linear(12, 3))


def test_hidden_layers_are_no_classifiers() -> None:
    """Whose results something takes: a layer, a norm, a product with a table."""
    wide = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 12), nn.Linear(12, 5))
    normed = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(12, 5))
    table = nn.Sequential(nn.Linear(8, 5), nn.Embedding(5, 12), nn.Linear(12, 5))
    for base in (wide, normed, table):
        assert classifiers(base, str(len(base) - 1)) == []


TIMM = {
    "repvit_m0_9": ["head.head.l", "head.head_dist.l"],
    "volo_d1_224": ["head", "aux_head"],
    "crossvit_9_240": ["head.0", "head.1"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "levit_128": ["head.linear", "head_dist.linear"],
    "efficientvim_m1": ["heads.0", "heads.1", "heads.2", "heads.3"],
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_with_several(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        base = timm.create_model(name, num_classes=10)
        model = TaskModel(base, ProbeConfig())
        with pytest.raises(ConfigError) as refused:
            model.add_task("t", num_classes=10)
    assert f"head_module={TIMM[name]!r}" in str(refused.value)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swinv2_tiny_window8_256", "convit_tiny"])
def test_timms_models_with_one(name: str) -> None:
    timm = pytest.importorskip("timm")
    for classes in (2, 4, 10, 24, 192):
        with torch.device("meta"):
            base = timm.create_model(name, num_classes=classes)
        (head,) = [n for n, m in base.named_modules() if m is base.get_classifier()]
        assert set(classifiers(base, head)) <= {head}


def test_a_distilled_transformer_learns_with_both(tmp_path) -> None:
    timm = pytest.importorskip("timm")

    def make() -> nn.Module:
        torch.manual_seed(0)
        size = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
        return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=10, **size).eval()

    x = torch.randn(4, 3, 32, 32)
    model = TaskModel(make(), TapsConfig(lam=0.1), head_module=BOTH)
    model.add_task("t", num_classes=3)
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x, task="t"), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(make()).eval()
    fresh.load_task(tmp_path / "t.taps")
    with torch.no_grad():
        assert same_bits(fresh(x, task="t"), model.eval()(x, task="t"))


@pytest.mark.parametrize("config", [TapsConfig(lam=0.5), FullConfig()], ids=["taps", "full"])
def test_a_task_without_a_head(config, tmp_path) -> None:
    """The base's own is a layer like any; whoever loads the file need not say so."""
    base, x = distilled(), torch.randn(2, 8)
    model = TaskModel(copy.deepcopy(base), config, head_module=[]).eval()
    model.add_task("t")
    assert {"head", "head_dist"} <= {row.layer for row in model.report("t").rows}
    with pytest.raises(ConfigError, match="head_module: no linear classifier"):
        model.add_task("u", num_classes=3)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
        want = model(x, task="t")
        model.save_task("t", tmp_path / "t.taps")
        for heads in ([], BOTH, None):
            fresh = TaskModel(copy.deepcopy(base), config, head_module=heads).eval()
            fresh.load_task(tmp_path / "t.taps")
            assert same_bits(fresh(x, task="t"), want)


def test_heads_of_several_sizes_get_no_number_of_classes() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    base.add_module("scores", nn.Linear(4, 3))
    base.add_module("boxes", nn.Linear(4, 12))
    model = TaskModel(base, TapsConfig(lam=0.5), head_module=["scores", "boxes"])
    with pytest.raises(ConfigError, match="num_classes: expected none for heads of several sizes .*'boxes': 12"):
        model.add_task("t", num_classes=2)
    model.add_task("t")
