"""Modules with tensors of a task's own: caches, stored methods, later settings, readers from outside, tied tensors."""

import copy
import functools
import itertools
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import (
    FullConfig,
    TapsConfig,
    TaskModel,
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
            "default": lambda x, own=self: own.scaled(x) * own.gamma,
            "keyword": lambda x, *, own=self: own.scaled(x) * own.gamma,
            "closure": lambda x, *, power=1.0: self.scaled(x) * self.gamma**power,
        }[how]

    def scaled(self, x: Tensor, twice: bool = False) -> Tensor:
        return (x * self.gamma * (2.0 if twice else 1.0)).clamp(max=self.limit)

    def forward(self, x: Tensor) -> Tensor:
        return (self.run[0] if isinstance(self.run, list) else self.run)(x)


@pytest.mark.parametrize("how", ["method", "partial", "list", "default", "keyword", "closure"])
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


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)
        self.run = lambda x: self.fc(self.drop(x))
        self.twice = functools.partial(lambda f, x: f(f(x)), lambda x: self.drop(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.twice(x))


def test_a_base_that_closes_over_itself_is_in_evaluation_mode() -> None:
    model, x = TaskModel(Dropping(), TapsConfig(lam=0.0)), torch.randn(5, 4)
    model.add_task("t")
    before = model.eval()(x, task=None)
    assert torch.equal(model.train()(x, task=None), before)
    assert not torch.equal(model(x, task="t"), model(x, task="t"))  # the task's dropout is alive


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
    assert copy.deepcopy(model).merge_and_unload("t")[1].momentum == 0.5
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


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_norm_of_anothers_is_a_norm(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), LlamaRMSNorm(), nn.Linear(4, 3)).eval()
    plain, x = copy.deepcopy(base), torch.randn(5, 4)
    model = shaken(task_on(base, TapsConfig(lam=0.0)).eval())
    output = model(x, task="t")
    assert model.report("t").norms == 4 and not torch.equal(model.state("t").table["1"].weight, torch.ones(4))
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(plain)
    fresh.load_task(tmp_path / "t.taps")
    assert torch.equal(fresh.eval()(x, task="t"), output)


class Derived(nn.Module):
    """Keeps what it made of its parameter in attributes: in forward, or when its mode changes."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.weight, self.when, self.made, self.merged = nn.Parameter(torch.randn(4)), when, None, False

    def train(self, mode: bool = True) -> "Derived":
        super().train(mode)
        if self.when == "mode":
            self.made = None if mode else self.weight.detach().exp()
        if self.when == "merge" and self.merged == mode:  # as loralib: its weight is another one in evaluation
            with torch.no_grad():
                self.weight += -1.0 if mode else 1.0
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "merge":
            return x * (self.weight if self.merged else self.weight + 1.0)
        if self.made is None:
            return x * self.weight.exp() if self.when == "mode" else self.keep(x)
        return x * self.made

    def keep(self, x: Tensor) -> Tensor:
        self.made = self.weight.detach().exp()
        return x * self.made


@pytest.mark.parametrize("when", ["forward", "mode", "merge"])
def test_what_a_module_derives_from_its_tensors_stays_with_them(when) -> None:
    torch.manual_seed(0)
    model, x = (
        TaskModel(nn.Sequential(nn.Linear(4, 4), Derived(when), nn.Linear(4, 3)), FullConfig()),
        torch.randn(5, 4),
    )
    for name in "ab":
        model.add_task(name)
    with torch.no_grad():
        base = model.train()(x, task=None)
        shaken(model, "a")
        found = [model(x, task=name) for name in "ab"]
        model.eval()
        for _ in range(2):
            torch.testing.assert_close(model(x, task=None), base)
            for name, output in zip("ab", found, strict=True):
                torch.testing.assert_close(model(x, task=name), output)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload("a")(x), found[0])
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x, task="a"), found[0])


class Freezing(nn.Module):
    """Keeps a child in evaluation mode, as many backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.body = nn.Parameter(torch.zeros(4)), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 3)

    def train(self, mode: bool = True) -> "Freezing":
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x + self.token))


def test_a_train_of_the_modules_own_may_touch_its_children() -> None:
    base = Freezing()
    model, x = task_on(base), torch.randn(5, 4)
    model.extract_task("copy", copy.deepcopy(base).state_dict())
    model.train()
    assert base.body.training and not base.body[1].training
    assert torch.equal(model(x, task="t"), model(x, task="t"))
    model.state("t").eval()
    assert base.body.training  # a task's mode is its own


class Sink(nn.Module):
    def __init__(self, losses: list, named: dict) -> None:
        super().__init__()
        self.scale, self.losses, self.named = nn.Parameter(torch.ones(4)), losses, named

    def forward(self, x: Tensor) -> Tensor:
        self.losses.append((x * self.scale).square().mean())
        self.named["last"] = self.losses[-1]
        return x * self.scale


class Collecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.losses, self.named = [], {}
        self.body, self.sink, self.fc = nn.Linear(4, 4), Sink(self.losses, self.named), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.losses.clear()
        output = self.fc(self.sink(self.body(x)))
        return output, sum(self.losses) + self.named["last"]


def test_containers_that_modules_share_stay_shared() -> None:
    model, x = task_on(Collecting()), torch.randn(5, 4)
    model(x, task="t")[1].backward()
    assert model.state("t").table["sink"].scale.grad.abs().sum() > 0.0
    with torch.no_grad():
        want = shaken(model)(x, task="t")[1]
        merged = model.merge_and_unload("t")
        assert merged.named is merged.sink.named and torch.equal(merged(x)[1], want)


def test_a_wrapper_around_a_module_is_no_replacement() -> None:
    model, x = task_on(nn.Sequential(nn.Linear(4, 4), Scale("method"), nn.Linear(4, 3))), torch.randn(5, 4)
    want = model(x, task="t")
    model.base[0] = nn.Sequential(model.base[0], nn.Identity())
    model.base[1] = nn.Sequential(model.base[1])
    assert torch.equal(model(x, task="t"), want)


def test_threads_may_write_to_a_module_while_it_is_followed() -> None:
    count = itertools.count()

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.__dict__.update({f"number{n}": n for n in range(2000)})  # long enough to be interrupted in reading

        def forward(self, x: Tensor) -> Tensor:
            setattr(self, f"kept{next(count)}", x)
            return x * self.weight

    model = task_on(nn.Sequential(nn.Linear(4, 4), Keeps(), nn.Linear(4, 3))).eval()
    x, wrong = torch.randn(2, 4), []

    def work(task: str | None) -> None:
        try:
            with torch.no_grad():
                for _ in range(400):
                    model(x, task=task)
        except RuntimeError as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, ("t", None, "t")))
    finally:
        sys.setswitchinterval(before)
    assert not wrong
