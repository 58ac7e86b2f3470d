"""Training modes, ownership of a base, copies and threads: adapting leaves nothing behind."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import Tensor, nn

from taps_ext import ConfigError, FullConfig, TapsConfig, TapsError, TaskModel, UnsupportedModuleError


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("during", [True, False])
def test_unload_restores_every_mode(start, during) -> None:
    base = settle(TinyNet(dropout=0.2)).train(start)
    base.drop.eval()
    before = modes(base)
    model = TaskModel(base, TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    model.train(during)
    model(images(), task="t")
    assert modes(model.unload()) == before


@pytest.mark.parametrize("mode", [True, False])
def test_a_merged_copy_is_in_the_models_mode(mode) -> None:
    model = TaskModel(settle(TinyNet()).train(), TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    model.eval()
    x = images()
    want = model(x, task="t")
    model.train(mode)
    plain = model.merge_and_unload("t")
    assert set(modes(plain)) == {mode}
    if not mode:
        assert torch.equal(plain(x), want)


def test_one_base_has_one_task_model() -> None:
    base = settle(TinyNet())
    first = TaskModel(base, TapsConfig(lam=1.0))
    first.add_task("t", num_classes=2)
    with pytest.raises(ConfigError, match="another TaskModel adapts"):
        TaskModel(base, TapsConfig(lam=1.0))
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        with pytest.raises(ConfigError, match="another TaskModel adapts"):
            TaskModel(twin.base)
        assert twin(images(), task="t").shape == (3, 2)
    assert first(images(), task="t").shape == (3, 2)
    first.delete_task("t")
    second = TaskModel(base, TapsConfig(lam=1.0))  # one without tasks makes way
    second.add_task("t", num_classes=2)
    with pytest.raises(TapsError, match="was unloaded"):
        first.add_task("u", num_classes=2)
    first.unload()
    assert second(images(), task="t").shape == (3, 2)
    del second  # and so does one that is gone
    third = TaskModel(base, TapsConfig(lam=1.0))
    third.add_task("t", num_classes=2)
    assert all(p.requires_grad for p in third.unload().parameters())


def test_a_model_can_be_pickled() -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0)).eval()
    model.add_task("t", num_classes=2)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    x = images()
    assert torch.equal(again(x, task="t"), model(x, task="t"))
    assert type(again.unload().conv1) is nn.Conv2d


def test_names_that_modules_use_themselves() -> None:
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("keys", nn.Linear(3, 3))
            self.add_module("fc", nn.Linear(3, 2))

        def forward(self, x):
            return self.fc(self._modules["keys"](x))

    model = TaskModel(Odd(), TapsConfig(lam=1.0))
    for name in ("type", "values", "train", "items", "pop"):
        model.add_task(name, num_classes=2)
        assert model(torch.ones(1, 3), task=name).shape == (1, 2)


def test_a_head_with_two_names_and_a_model_without_one() -> None:
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)])
            self.fc = self.layers[-1]

        def forward(self, x):
            return self.fc(self.layers[0](x))

    for arguments in ({}, {"head_module": "fc"}):
        model = TaskModel(Alias(), TapsConfig(lam=1.0), **arguments)
        model.add_task("t", num_classes=5)
        assert model(torch.ones(1, 3), task="t").shape == (1, 5)
        assert [r.layer for r in model.report("t").rows] == ["layers.0"]
    block = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 3))
    model = TaskModel(nn.Sequential(nn.Linear(3, 3), block), TapsConfig(lam=1.0))
    with pytest.raises(ConfigError, match="no linear classifier was found"):
        model.add_task("t", num_classes=5)


def test_the_fused_encoder_path_sees_the_task_or_is_not_taken() -> None:
    """nn.TransformerEncoderLayer reads its weights directly in evaluation without gradients, and only then."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = nn.Sequential(encoder, nn.Linear(8, 2)).eval()
    model = TaskModel(base, TapsConfig(lam=1.0, exclude_modules=["0.self_attn"])).eval()
    model.add_task("t", num_classes=2)
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_()
    unfused = model(x, task="t")
    with torch.no_grad():
        assert torch.equal(model(x, task="t"), unfused)
        plain = copy.deepcopy(model).merge_and_unload("t").eval()
        torch.testing.assert_close(plain(x), unfused)  # the fused kernel sums in another order
        for _, part, _ in model.state("t").gated():
            part.gate.score.fill_(0.0)
        plain = copy.deepcopy(model).merge_and_unload("t").eval()
        assert torch.equal(model(x, task="t"), plain(x))


def helper(module: nn.Module, x: Tensor) -> Tensor:
    """Reads a flag where no code of the module's class does."""
    return F.dropout(x, 0.5, module.training)


class Hidden(nn.Module):
    """Modes read by a function outside, by a hook, by a list of modules, by an override on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Identity(), nn.Dropout(0.5)
        self.listed = [self.third]
        self.fc = nn.Linear(6, 3)
        self.second.register_forward_hook(lambda module, _, out: helper(module, out))

    def forward(self, x: Tensor) -> Tensor:
        x = helper(self, self.first(x))
        return self.fc(self.extra(self.listed[0](self.second(x))))

    def extra(self, x: Tensor) -> Tensor:
        return x


def overridden(self: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, self.training)


def test_the_bare_base_is_in_evaluation_mode_whoever_asks() -> None:
    base = Hidden()
    base.extra = types.MethodType(overridden, base)
    x = torch.randn(4, 6)
    want = base.eval()(x)
    model = TaskModel(base, TapsConfig(lam=1.0)).train()
    model.add_task("t", num_classes=2)
    assert torch.equal(model(x, task=None), want) and base.training and base.third.training
    assert not torch.equal(model(x, task="t"), model(x, task="t"))
    with torch.no_grad():
        base.first.weight.mul_(2)  # the mirror holds the base's own tensors
    base.fc = nn.Linear(6, 5)
    assert model(x, task=None).shape == (4, 5)
    assert torch.equal(model(x, task=None), model.eval()(x, task=None))


def test_traced_graphs_are_bases_too() -> None:
    """torch.fx's modules copy themselves in their own way."""
    base = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)))
    model = TaskModel(base, TapsConfig(lam=1.0), head_module="2")
    model.add_task("t", num_classes=2)
    x = torch.randn(3, 4)
    want = model.eval()(x, task="t")
    assert torch.equal(copy.deepcopy(model)(x, task="t"), want)
    assert set(model.task_state_dict("t")) == set(base.state_dict())
    assert torch.equal(model.merge_and_unload("t")(x), want)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(UnsupportedModuleError, match="1: expected a module of Python code, got a scripted one"):
        TaskModel(nn.Sequential(nn.Linear(4, 4), scripted))


@pytest.mark.parametrize("how", ["copy", "cast", "pickle"])
def test_merged_tasks_refuse_gradients_after_a_copy(how: str) -> None:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0)).eval()
    model.add_task("t", num_classes=2)
    model.merge_task("t")
    if how == "cast":
        model.double()
    other = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    for one in (model, other):
        loss = one(images().to(next(one.parameters()).dtype), task="t").sum()
        with pytest.raises(TapsError, match="is merged, so its Deltas get no gradient"):
            loss.backward()


@pytest.mark.parametrize(
    "spoil", [torch.nn.utils.spectral_norm, torch.nn.utils.weight_norm], ids=["spectral_norm", "weight_norm"]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_write_weights_are_refused(spoil) -> None:
    from taps_ext import UnsupportedModuleError

    base = nn.Sequential(spoil(nn.Linear(3, 3)), nn.Linear(3, 2))
    with pytest.raises(UnsupportedModuleError, match="0: expected a plain Linear, got one under weight or spectral"):
        TaskModel(base, TapsConfig(lam=1.0)).add_task("t", num_classes=2)


class Ema(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class EmaAnew(Ema):
    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


@pytest.mark.parametrize("kind", [Ema, EmaAnew])
def test_training_that_writes_to_the_base_is_an_error_or_the_tasks_own(kind) -> None:
    model = TaskModel(nn.Sequential(nn.Linear(3, 3), kind(), nn.Linear(3, 2)), TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    model.train()
    with pytest.raises(TapsError, match="training wrote to the base's buffer 1.mean"):
        model(torch.ones(4, 3), task="t")
    base = nn.Sequential(nn.Linear(3, 3), kind(), nn.Linear(3, 2))
    model = TaskModel(base, FullConfig())
    model.add_task("t", num_classes=2)
    model.train()
    model(torch.ones(4, 3), task="t")
    assert not base[1].mean.any() and model.state("t").table["1"].mean.any()


def test_the_bare_base_and_training_do_not_meet_across_threads() -> None:
    """While tasks train with dropout, base calls are exact and task calls keep their dropout."""
    base = settle(TinyNet(dropout=0.5))
    model = TaskModel(base, TapsConfig(lam=1.0))
    model.add_task("t", num_classes=4)
    x = images()
    with torch.no_grad():
        want = model.eval()(x, task=None)
        model.train()
        wrong: list[str] = []
        seen: list[bool] = []
        base.drop.register_forward_hook(lambda m, a, o: seen.append(m.training) if torch.is_tensor(o) else None)

        def bare() -> None:
            with torch.no_grad():
                for _ in range(40):
                    if not torch.equal(model(x, task=None), want):
                        wrong.append("base")

        def task() -> None:
            with torch.no_grad():
                for _ in range(40):
                    model(x, task="t")

        threads = [threading.Thread(target=f) for f in (bare, bare, task, task)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == [] and seen.count(True) == 80 and seen.count(False) == 80


def test_flags_come_back_to_parameters_that_were_loaded() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    base[1].bias.requires_grad_(False)
    model = TaskModel(base, TapsConfig(lam=0.0))
    model.add_task("t")
    model.load_state_dict(model.state_dict(), assign=True)
    assert [p.requires_grad for p in model.unload().parameters()] == [True, True, True, False]


class Branches(nn.Module):
    """Runs whatever children and scale it has now."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
        self.factor, self.fc = 2.0, nn.Linear(3, 2)

    def forward(self, x):
        for layer in self.body.values():
            x = layer(x)
        return self.fc(x * getattr(self, "factor", 1.0))


def test_the_bare_base_in_training_is_the_base_as_it_is_now() -> None:
    """Children and attributes that were removed, renamed or put in another order since its first forward."""
    model = TaskModel(Branches(), TapsConfig(lam=1.0)).train()
    base, x = model.base, torch.randn(4, 3)

    def same() -> None:
        assert torch.equal(model(x, task=None), base(x))

    same()
    base.body["a"] = base.body.pop("a")
    assert list(base.body) == ["b", "a"]
    same()
    del base.body["b"]
    same()
    base.body["c"] = base.body.pop("a")
    same()
    del base.factor
    same()


def test_modes_that_are_assigned_are_modes() -> None:
    """As training loops do that note the mode of every module, evaluate, and assign what they noted."""
    model = TaskModel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), TapsConfig(lam=1.0)).train()
    model.add_task("t")
    own = model.state("t").table["1"]
    for steps in (1, 2):
        noted = {module: module.training for module in model.modules()}
        model.eval()(torch.randn(4, 3), task="t")
        for module, mode in noted.items():
            module.training = mode
        model(torch.randn(4, 3), task="t")
        assert own.num_batches_tracked == steps
    model.base[1].eval()  # one that its user freezes rests
    model(torch.randn(4, 3), task="t")
    assert own.num_batches_tracked == 2
