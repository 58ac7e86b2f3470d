"""Modules with tensors of a task's own: caches, stored methods, later settings, readers from outside, tied tensors."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import (
    BypassedLayerError,
    ConfigError,
    FullConfig,
    TapsConfig,
    TapsError,
    TaskModel,
    UnsupportedModuleError,
)


def task_on(base: nn.Module, config=None, **options) -> TaskModel:
    model = TaskModel(base, config or FullConfig())
    model.add_task("t", **options)
    return model


def shaken(model: TaskModel, name: str = "t", seed: int = 0) -> TaskModel:
    """Every tensor of a task a little different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.state(name).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


class Cached(nn.Module):
    """As timm's LeViT: in evaluation mode a dictionary keeps what is made of a parameter; training clears it."""

    def __init__(self) -> None:
        super().__init__()
        self.biases, self.cache = nn.Parameter(torch.randn(4)), {}

    def train(self, mode: bool = True) -> "Cached":
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.biases * 2.0
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.biases.detach() * 2.0
        return x + self.cache["cpu"]


def test_a_cache_is_a_tasks_own(tmp_path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), Cached(), nn.Linear(4, 3)).eval()
    plain, x = copy.deepcopy(base), torch.randn(5, 4)
    with torch.no_grad():
        want = base(x)  # the base's cache is there before there are tasks
        model = TaskModel(base, FullConfig())
        for seed, name in enumerate("ab"):
            model.add_task(name)
            shaken(model, name, seed)
            model.save_task(name, tmp_path / name)
        model.eval()
        outputs = {name: model(x, task=name) for name in "ab"}
        assert not torch.equal(outputs["a"], outputs["b"]) and torch.equal(model(x, task=None), want)
        for name, output in outputs.items():
            fresh = TaskModel(copy.deepcopy(plain))
            fresh.load_task(tmp_path / name)
            assert torch.equal(fresh.eval()(x, task=name), output)
            assert torch.equal(copy.deepcopy(model).merge_and_unload(name)(x), output)
        model.reload_task("a", tmp_path / "a")  # in evaluation mode, with a cache
        shaken(model, "a", 7)
        model.train().eval()
        assert not torch.equal(model(x, task="a"), outputs["a"])
        model.reload_task("a", tmp_path / "a")
        assert torch.equal(model(x, task="a"), outputs["a"])


class Scale(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.gamma, self.limit = nn.Parameter(torch.ones(4)), 100.0
        self.run = {
            "method": self.scaled,
            "partial": functools.partial(self.scaled, twice=True),
            "list": [self.scaled],
            "closure": lambda x: x * self.gamma,
        }[how]

    def scaled(self, x: Tensor, twice: bool = False) -> Tensor:
        return (x * self.gamma * (2.0 if twice else 1.0)).clamp(max=self.limit)

    def forward(self, x: Tensor) -> Tensor:
        return (self.run[0] if isinstance(self.run, list) else self.run)(x)


@pytest.mark.parametrize("how", ["method", "partial", "list"])
def test_stored_methods_are_the_tasks(how) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), Scale(how), nn.Linear(4, 3)).eval()
    x, want = torch.randn(5, 4), base(torch.ones(1, 4))
    model = task_on(base)
    model(x, task="t").square().sum().backward()
    assert model.state("t").table["1"].gamma.grad.abs().sum() > 0.0
    shaken(model).eval()
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 4), task=None), want)
        output = model(x, task="t")
        torch.testing.assert_close(model.merge_and_unload("t")(x), output)


def test_a_closure_over_a_module_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 4), Scale("closure"), nn.Linear(4, 3))
    model = TaskModel(base, FullConfig())
    with pytest.raises(UnsupportedModuleError, match=r"Scale\.run: expected a method, got a function that closes over"):
        model.add_task("t")
    assert model.tasks == []
    model.add_task("t", config=FullConfig(exclude_modules=["1"]))

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)
            self.run = lambda x: self.fc(self.drop(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    model = TaskModel(Dropping(), TapsConfig(lam=0.0))
    model.add_task("t")
    x = torch.randn(5, 4)
    before = model.eval()(x, task=None)
    with pytest.raises(UnsupportedModuleError, match=r"Dropping\.run"):  # dropout would be alive in the base
        model.train()(x, task=None)
    assert torch.equal(model.eval()(x, task=None), before)


def test_what_is_set_later_is_the_tasks_too() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Scale("method"), nn.Linear(4, 3))
    model, x = task_on(base), 3.0 + torch.randn(8, 4)
    own = model.state("t").table["1"]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum, module.eps = 0.0, 1.0
    base[2].limit = 0.25
    output = model(x, task="t")
    assert torch.equal(own._buffers["running_mean"], torch.zeros(4))
    want = copy.deepcopy(model).merge_and_unload("t")
    torch.testing.assert_close(output, want.train()(x))
    assert want[1].eps == 1.0 and want[2].limit == 0.25
    base[1].momentum = 0.5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # as many do to keep the statistics
    model(x, task="t")
    assert torch.equal(own._buffers["running_mean"], torch.zeros(4))
    model.train()
    model(x, task="t")
    assert own._buffers["running_mean"].abs().min() > 0.0


class Reader(nn.Module):
    """Reads tensors of modules whose forward runs elsewhere, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.norm, self.tokens = nn.BatchNorm1d(4), nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.rope = nn.Module()
        self.rope.register_buffer("bands", torch.linspace(0.5, 1.5, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, i: Tensor) -> Tensor:
        x = self.mid(self.emb(i)).mean(1) * self.rope.bands + self.tokens[0] - self.tokens[1]
        return self.fc(self.norm(x) * self.norm.weight + F.linear(x, self.emb.weight).mean(1, keepdim=True))


def test_tensors_read_from_outside_are_the_tasks() -> None:
    torch.manual_seed(0)
    base, ids = Reader(), torch.randint(0, 7, (6, 5))
    tuned = copy.deepcopy(base)
    before = base.eval()(ids)
    model = task_on(base).train()
    tuned.train()
    for net in (model, tuned):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(ids, **({"task": "t"} if net is model else {})).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        output = model.eval()(ids, task="t")
        torch.testing.assert_close(output, tuned.eval()(ids))
        assert torch.equal(model(ids, task=None), before)
        model.extract_task("copy", tuned.state_dict())
        torch.testing.assert_close(model(ids, task="copy"), tuned(ids), rtol=0, atol=1e-6)
        merged = copy.deepcopy(model).merge_and_unload("t")
        torch.testing.assert_close(merged(ids), output, rtol=0, atol=1e-6)


def test_hooks_on_a_norm_see_the_running_tasks_tensors() -> None:
    model, seen = task_on(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))), []
    model.base[1].register_forward_hook(lambda module, args, output: seen.append(module.weight))
    model(torch.randn(5, 4), task="t")
    assert seen[0] is model.state("t").table["1"].weight


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.decoder = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.emb.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.decoder(self.mid(self.emb(i)))


def test_tied_tensors_do_not_become_two_in_silence() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"decoder\.weight: is one tensor with emb\.weight"):
        task_on(Tied())  # the head is a copy of the base's
    model = TaskModel(nn.Sequential(Tied(), nn.Linear(7, 2)), FullConfig())
    with pytest.raises(UnsupportedModuleError, match=r"0\.decoder\.weight: is one tensor with 0\.emb\.weight"):
        model.add_task("t")
    assert model.tasks == []
    model.add_task("t", config=FullConfig(exclude_modules=["0.emb"]))
    checkpoint = model.task_state_dict("t")  # the same values still
    assert torch.equal(checkpoint["0.decoder.weight"], checkpoint["0.emb.weight"])
    shaken(model)
    with pytest.raises(TapsError, match=r"0\.decoder\.weight: is one tensor with 0\.emb\.weight"):
        model.task_state_dict("t")
    ids = torch.randint(0, 7, (6, 5))
    with torch.no_grad():
        want = model.eval()(ids, task="t")
        torch.testing.assert_close(model.merge_and_unload("t")(ids), want)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)
        self.out = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


def test_a_head_with_two_names_is_replaced_under_both() -> None:
    model, x = task_on(TwoNames(), num_classes=5).eval(), torch.randn(6, 4)
    checkpoint = model.task_state_dict("t")
    assert torch.equal(checkpoint["fc.weight"], checkpoint["out.weight"])
    with torch.no_grad():
        want = model(x, task="t")
        model.extract_task("again", checkpoint)
        assert torch.equal(model(x, task="again"), want)
        merged = model.merge_and_unload("t")
        assert merged.out is merged.fc and torch.equal(merged(x), want)


def test_a_module_that_was_replaced_is_noticed() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model, x = task_on(base, TapsConfig(lam=0.0)), torch.randn(2, 3, 8, 8)
    model(x, task="t")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(TapsError, match="^1: another module has taken its place"):
        model.eval()(x, task="t")


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.fc(x + self.aux(x)) if self.training else self.fc(x)


def test_what_only_training_runs_is_known_to_the_file(tmp_path) -> None:
    torch.manual_seed(0)
    base = Auxiliary()
    plain, x = copy.deepcopy(base), torch.randn(5, 4)
    model = task_on(base, TapsConfig(lam=0.0))
    model.train()(x, task="t")
    want = model.eval()(x, task="t")
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(copy.deepcopy(plain))
    fresh.load_task(tmp_path / "t.taps")
    assert torch.equal(fresh.eval()(x, task="t"), want)
    never = TaskModel(plain, TapsConfig(lam=0.0))
    never.add_task("t")
    with pytest.raises(BypassedLayerError, match="aux"):
        never.eval()(x, task="t")


def test_a_state_dict_holds_fixed_gates() -> None:
    def made() -> TaskModel:
        torch.manual_seed(0)
        return task_on(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3)), TapsConfig(lam=0.0))

    one, other, x = shaken(made()), made(), torch.randn(5, 4)
    with pytest.raises((RuntimeError, ConfigError), match="gate|score"):
        one.set_gates("t", open=["0"])
        other.load_state_dict(one.state_dict())
    other.freeze_gates()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.eval()(x, task="t"), one.eval()(x, task="t"))
    assert other.state("t").open_layers() == ["0"]
    other.merge_task("t")
    with pytest.raises(TapsError, match="load_state_dict: task 't' is merged"):
        other.load_state_dict(one.state_dict())


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(super().forward(x))


class Noted(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}


def test_heads_are_a_tasks_own_and_what_the_file_says(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    plain = copy.deepcopy(base)
    head, model = Cosine(4, 5), TaskModel(base, FullConfig())
    model.add_task("a", head=head)
    with pytest.raises(ConfigError, match="shares tensors with the base or a task"):
        model.add_task("b", head=head)
    for bad, message in ((nn.LazyLinear(3), "initialised parameters"), (Noted(4, 3), "extra state")):
        with pytest.raises(ConfigError, match=f"head: .*{message}"):
            model.add_task("b", head=bad)
    model.save_task("a", tmp_path / "a.taps")
    fresh = TaskModel(plain)
    with pytest.raises(ConfigError, match="holds a Cosine, got a Linear"):
        fresh.load_task(tmp_path / "a.taps", head=nn.Linear(4, 5))
    fresh.load_task(tmp_path / "a.taps", head=Cosine(4, 5))
    x = torch.randn(6, 4)
    assert torch.equal(fresh.eval()(x, task="a"), model.eval()(x, task="a"))


def test_no_layer_to_gate_is_said() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.warns(UserWarning, match="no layer outside the head can be gated"):
        task_on(nn.Sequential(Transposed(), nn.Linear(6, 3)), TapsConfig(lam=0.5))
