"""TaskModel: tasks, heads, merging, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import Bypass, TinyNet, WithToken, images, settle
from torch import nn

import taps_ext
from taps_ext import (
    BypassedLayerError,
    ConfigError,
    FullConfig,
    ProbeConfig,
    TapsConfig,
    TapsError,
    TaskModel,
    UnsupportedModuleError,
)
from taps_ext.methods import MethodConfig

METHODS = [TapsConfig(lam=1.0), TapsConfig(lam=1.0, others="task"), FullConfig(), ProbeConfig()]


def tiny(config=None, **arguments) -> TaskModel:
    return TaskModel(settle(TinyNet()), config or TapsConfig(lam=1.0), **arguments)


def train(model: TaskModel, name: str, steps: int = 3, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameter_groups(name, lr=lr), momentum=0.9)
    classes = model(images(), task=name).shape[1]
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        target = torch.arange(4) % classes
        (F.cross_entropy(model(images(4), task=name), target) + model.sparsity_loss(name)).backward()
        optimizer.step()
    model.eval()


def test_three_lines() -> None:
    model = tiny()
    model.add_task("birds", num_classes=7)
    assert model(images(), task="birds").shape == (3, 7)
    assert model(images()).shape == (3, 4)  # no active task: the base


@pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.method}-{getattr(c, 'others', '')}")
def test_a_new_task_is_the_base_with_a_new_head(config) -> None:
    model = tiny(config).eval()
    model.add_task("t")  # a copy of the base's head
    x = images()
    assert torch.equal(model(x, task="t"), model(x, task=None))


@pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.method}-{getattr(c, 'others', '')}")
@pytest.mark.parametrize("gates", ["host", "device"])
def test_save_load_merge_copy_unload(config, gates, tmp_path) -> None:
    model = tiny(config, gates=gates)
    x = images()
    want = model(x, task=None)
    model.add_task("t", num_classes=5)
    train(model, "t")
    if config.method == "taps":
        with torch.no_grad():
            model.state("t").table["conv2"].gate.score.fill_(0.02)
    out = model(x, task="t")
    size = model.save_task("t", tmp_path / "t.taps", labels=list("abcde"), metrics={"accuracy": 0.5})
    assert size == (tmp_path / "t.taps").stat().st_size
    fresh = TaskModel(copy.deepcopy(model).unload(), gates=gates)
    assert fresh.load_task(tmp_path / "t.taps") == "t"
    assert torch.equal(fresh.eval()(x, task="t"), out)
    assert fresh.load_task(tmp_path / "t.taps", "again") == "again"
    assert fresh.report("again").to_dict() == {**model.report("t").to_dict(), "task": "again"}
    fresh.save_task("t", tmp_path / "again.taps", labels=list("abcde"), metrics={"accuracy": 0.5})
    assert (tmp_path / "t.taps").read_bytes() == (tmp_path / "again.taps").read_bytes()
    model.merge_task("t")
    assert torch.equal(model(x, task="t"), out) and torch.equal(model(x, task=None), want)
    with pytest.raises(TapsError, match="merged already"):
        model.merge_task("t")
    model.unmerge_task()
    assert torch.equal(model(x, task="t"), out)
    other = copy.deepcopy(model)
    assert torch.equal(other(x, task="t"), out)
    plain = other.merge_and_unload("t")
    assert torch.equal(plain.eval()(x), out)
    assert all(not type(m).__module__.startswith("taps_ext") for m in plain.modules())
    assert all(type(m).forward is type(m).__mro__[0].forward for m in plain.modules())
    assert torch.equal(model.unload().eval()(x), want)


def test_training_a_merged_task_is_refused() -> None:
    model = tiny()
    model.add_task("t", num_classes=3)
    model.merge_task("t")
    model.train()
    with pytest.raises(TapsError, match="merged"):
        model(images(), task="t")


def test_full_config_is_plain_fine_tuning_step_for_step() -> None:
    """SGD with momentum on Delta moves W + Delta as it moves the weights of a copy (float64: to rounding)."""
    torch.manual_seed(0)
    base = settle(TinyNet()).double()
    plain = copy.deepcopy(base).train()
    model = TaskModel(base, FullConfig())
    model.add_task("t")
    model.train()
    ours = torch.optim.SGD(model.parameter_groups(lr=0.05), momentum=0.9)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for step in range(5):
        x, y = images(6, dtype=torch.float64), torch.arange(6) % 4
        losses = []
        for net, optimizer, task in ((model, ours, {"task": "t"}), (plain, theirs, {})):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x, **task), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Delta is float32: after n steps its rounding is n * eps32 / 2 of its size, and the loss moves by no more
        assert losses[0] == pytest.approx(losses[1], rel=(step + 1) * torch.finfo(torch.float32).eps)
    for (name, a), b in zip(plain.named_buffers(), [*model.state("t").table["bn1"].buffers()], strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-5), name


def test_names_of_tasks() -> None:
    model = tiny()
    model.add_task("a", num_classes=2)
    model.add_task("b.c", num_classes=3)
    assert model.tasks == ["a", "b.c"] and model.active_task is None
    model.set_task("a")
    with model.use_task("b.c"):
        assert model.active_task == "b.c" and model(images()).shape[1] == 3
    assert model.active_task == "a"
    model.rename_task("a", "z")
    assert model.tasks == ["z", "b.c"] and model.active_task == "z" and model(images()).shape[1] == 2
    model.delete_task("z")
    assert model.tasks == ["b.c"] and model.active_task is None
    for bad in ("", "a/b", "a\n", 3, "b.c"):
        with pytest.raises(ConfigError, match="name"):
            model.add_task(bad, num_classes=2)
    with pytest.raises(ConfigError, match=r"expected one of \['b.c'\], got 'b.d' \(did you mean 'b.c'\?\)"):
        model.set_task("b.d")
    with pytest.raises(ConfigError, match="task"):
        model(images(), task="nothing")
    with pytest.raises(ConfigError, match=r"tasks\[2\]: expected one of \['b.c'\] or None, got 'z'"):
        model(images(), tasks=["b.c", None, "z"])


class TakesTask(nn.Module):
    def forward(self, x, task=None):
        return x


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: TaskModel(TakesTask()), "base: its forward has an argument 'task'"),
        (lambda: TaskModel("resnet"), "base: expected an nn.Module"),
        (lambda: TaskModel(nn.DataParallel(TinyNet())), "base: expected the bare model"),
        (lambda: tiny(gates="hots"), "gates: expected 'host' or 'device', got 'hots'"),
        (lambda: TaskModel(TinyNet(), {"lam": 1}), "config: expected a method config"),
        (lambda: TaskModel(TinyNet()).add_task("t", num_classes=2), "config: expected"),
        (lambda: tiny().add_task("t", num_classes=0), "num_classes: expected an int >= 1"),
        (lambda: tiny().add_task("t", num_classes=True), "num_classes"),
        (
            lambda: tiny().add_task("t", num_classes=2, head=nn.Linear(12, 2)),
            "expected num_classes or head, got both",
        ),
        (lambda: tiny(head_module="hiden"), "no module 'hiden' .did you mean 'hidden'"),
        (
            lambda: tiny(TapsConfig(lam=1, target_modules=["conv9"])).add_task("t"),
            "target_modules: pattern 'conv9'",
        ),
        (lambda: tiny(TapsConfig(lam=1, exclude_modules=["x.*"])).add_task("t"), "exclude_modules: pattern"),
        (
            lambda: tiny(TapsConfig(lam=1, overrides={"zz*": {"learn": False}})).add_task("t"),
            "overrides: pattern",
        ),
        (lambda: TapsConfig(lam=-1), "lam: expected a number in"),
        (lambda: TapsConfig(lam=float("nan")), "lam: expected a number"),
        (lambda: TapsConfig(lam=1, penalty="layers"), "penalty: expected one of .*did you mean 'layer'"),
        (lambda: TapsConfig(lam=1, gate_fraction=0.0), "gate_fraction: expected a number in"),
        (lambda: TapsConfig(lam=1, target_modules="conv1"), "target_modules: expected a list"),
        (lambda: TapsConfig(lam=1, overrides={"a": {"scor": 1}}), "unknown key 'scor'"),
        (lambda: TapsConfig(lam=1, overrides={"a": {"open": True}}), "'open' fixes a gate"),
        (lambda: MethodConfig.from_dict({"method": "tap"}), "method: expected one of .*did you mean 'taps'"),
        (
            lambda: MethodConfig.from_dict({"method": "taps", "lamb": 1}),
            "unknown key 'lamb' .did you mean 'lam'",
        ),
    ],
)
def test_mistakes_are_named(call, message) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_head_that_is_part_of_the_base_is_refused() -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="shares tensors with the base or a task"):
        model.add_task("t", head=model.base.fc)
    model.add_task("t", head=copy.deepcopy(model.base.fc))
    x = images()
    assert torch.equal(model.eval()(x, task="t"), model(x, task=None))


@pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.method}-{getattr(c, 'others', '')}")
def test_config_round_trip(config) -> None:
    again = MethodConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and type(again) is type(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target_modules = ()


def test_a_bypassed_layer_is_an_error_and_can_be_excluded() -> None:
    model = TaskModel(Bypass(), TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    with pytest.raises(BypassedLayerError, match="never called forward on qkv,"):
        model(torch.randn(3, 6), task="t")
    model = TaskModel(Bypass(), TapsConfig(lam=1.0, exclude_modules=["qkv"]))
    model.add_task("t", num_classes=2)
    assert model(torch.randn(3, 6), task="t").shape == (3, 2)
    assert [row.layer for row in model.report("t").rows] == ["used"]


@pytest.mark.parametrize(
    "module,message",
    [
        (nn.utils.weight_norm(nn.Conv1d(2, 2, 1)), "body: expected a plain Conv1d, got one under weight or spectral"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), "body: expected a plain Linear, got one under weight or spectral"),
        (
            torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "body: expected a plain .*parametrised",
        ),
    ],
)
def test_what_cannot_be_gated_is_named_and_can_be_excluded(module, message) -> None:
    base = nn.Sequential()
    base.add_module("body", module)
    base.add_module("fc", nn.Linear(2, 2))
    with pytest.raises(UnsupportedModuleError, match=message):
        TaskModel(base, TapsConfig(lam=1.0)).add_task("t", num_classes=2)
    TaskModel(base, TapsConfig(lam=1.0, exclude_modules=["body"])).add_task("t", num_classes=2)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="0.weight: expected initialised parameters"):
        TaskModel(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), TapsConfig(lam=1.0))


def test_training_the_bare_base_by_mistake_is_said() -> None:
    model = tiny()
    model.add_task("t", num_classes=2)
    model.train()
    with pytest.warns(UserWarning, match="no task is active"):
        model(images())


def test_the_bare_base_in_evaluation_is_said_once_unless_it_was_asked_for() -> None:
    model = tiny().eval()
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # which has no task
        model.add_task("t", num_classes=2)
        model(x, task="t"), model(x, task=None)
        with model.use_task("t"):
            model(x)
        with model.use_task(None):
            model(x)
    for run in (model, torch.no_grad()(model)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(x)
        assert [(w.filename, "no task is active" in str(w.message)) for w in said] == [(__file__, True)][: run is model]
    other = tiny().eval()
    other.add_task("t", num_classes=2)
    other.set_task("t")
    other.set_task(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(x)


def test_use_task_restores_a_task_that_was_renamed_meanwhile() -> None:
    model = tiny()
    for name in ("a", "b"):
        model.add_task(name, num_classes=2)
    model.set_task("a")
    with model.use_task("b"):
        model.rename_task("a", "c")
        model.rename_task("b", "a")
        assert model.active_task == "a"
    assert model.active_task == "c"
    with model.use_task("a"):
        model.delete_task("c")
    assert model.active_task is None


def test_tied_weights_are_refused() -> None:
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    base[1].weight = base[0].weight
    with pytest.raises(UnsupportedModuleError, match="1: shares its weight with 0"):
        TaskModel(base, TapsConfig(lam=1.0)).add_task("t", num_classes=2)


def test_others_train_tokens_and_biases_and_buffers_stay_the_tasks_own(tmp_path) -> None:
    base = WithToken().eval()
    x = torch.randn(2, 4, 8)
    want = base(x)
    model = TaskModel(base, TapsConfig(lam=1.0, others="task"))
    model.add_task("t", num_classes=3)
    groups = {g["name"]: g["params"] for g in model.parameter_groups(lr=0.1)}
    assert sorted(tuple(p.shape) for p in groups["other"]) == [(1, 1, 8), (8,)]
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
    model(x, task="t").square().sum().backward()
    optimizer.step()
    out = model(x, task="t")
    part = model.state("t").table[""]
    assert not torch.equal(part.token, base.token)
    model.save_task("t", tmp_path / "t.taps")
    model.load_task(tmp_path / "t.taps", "u")
    assert torch.equal(model(x, task="u"), out) and torch.equal(model(x, task=None), want)
    plain = model.merge_and_unload("t")
    assert torch.equal(plain(x), out)


def test_running_statistics_are_the_tasks_own() -> None:
    model = tiny()
    model.add_task("a", num_classes=2)
    model.add_task("b", num_classes=2)
    before = model.base.bn1.running_mean.clone()
    model.train()
    model(images() + 3, task="a")
    parts = {name: model.state(name).table["bn1"] for name in "ab"}
    assert not torch.equal(parts["a"].running_mean, before)
    assert torch.equal(parts["b"].running_mean, before) and torch.equal(model.base.bn1.running_mean, before)
    assert parts["a"].num_batches_tracked == 1 and parts["b"].num_batches_tracked == 0
    assert not model.base.bn1.training


def test_the_bare_base_ignores_training_mode() -> None:
    model = TaskModel(settle(TinyNet(dropout=0.5)), TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    x = images()
    want = model.eval()(x, task=None)
    model.train()
    assert torch.equal(model(x, task=None), want) and model.base.drop.training
    assert not torch.equal(model(x, task="t"), model(x, task="t"))  # dropout follows .train() for a task


def test_public_names() -> None:
    assert all(hasattr(taps_ext, name) for name in taps_ext.__all__)


def test_a_base_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = TaskModel(TinyNet(), TapsConfig(lam=1.0))
    with pytest.raises(ConfigError, match="weight: expected one on a device, got one on meta"):
        model.add_task("t", num_classes=3)
    assert model.tasks == []
