"""What a task cannot hold or would lose is named: tied and shared tensors, replaced modules, unsaveable state."""

import copy
from contextlib import nullcontext

import pytest
import torch
from test_own_tensors import shaken, task_on
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
    base = TwoNames()
    other = copy.deepcopy(base)
    nn.init.ones_(other.fc.weight)
    assert TaskModel(other).fingerprint() == TaskModel(copy.deepcopy(base)).fingerprint()
    model, x = task_on(base, num_classes=5).eval(), torch.randn(6, 4)
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
    one.set_gates("t", open=["0"])
    with pytest.raises(ConfigError, match="state_dict: 0: expected a learned gate, got a fixed one"):
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
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    with pytest.warns(UserWarning, match="no layer outside the head can be gated"):
        task_on(nn.Sequential(Transposed(), nn.Linear(6, 3)), TapsConfig(lam=0.5))


class Centred(nn.Module):
    """Writes its buffer past autograd and version counters, as averaging code does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


def test_a_base_that_changed_unseen_is_not_the_parent_of_a_file(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3))
    plain, x = copy.deepcopy(base), torch.randn(5, 4)
    model = task_on(base, TapsConfig(lam=0.0))
    model.save_task("t", tmp_path / "before.taps")
    model.half().float()  # not a change
    model.save_task("t", tmp_path / "before.taps")
    model.train()(x, task="t")
    with pytest.raises(TapsError, match=r"the base's buffer 1\.mean has changed"):
        model.save_task("t", tmp_path / "t.taps")
    assert not (tmp_path / "t.taps").exists()
    model = task_on(plain, TapsConfig(lam=0.0, others="task"))
    model.train()(x, task="t")
    model.save_task("t", tmp_path / "t.taps")
    assert torch.equal(plain[1]._buffers["mean"], torch.zeros(4))
    assert model.state("t").table["1"].mean.abs().sum() > 0.0


class Unkept(nn.Module):
    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros(4), persistent=False)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1.0)
        return x * self.scale + self.seen


class Extra(Unkept):
    def get_extra_state(self) -> bool:
        return self.extra

    def set_extra_state(self, state: bool) -> None:
        self.extra = state


class LazyMask(nn.Module):
    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(4), persistent=False)
        return x * self.scale * self.mask


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Unkept, "a buffer seen that is not persistent"), (Extra, "extra state and a buffer"), (LazyMask, None)],
)
def test_what_no_file_keeps_is_not_left_out_in_silence(tmp_path, kind, message) -> None:
    model = task_on(nn.Sequential(nn.Linear(4, 4), kind(True), nn.Linear(4, 3)))
    model.train()(torch.randn(5, 4), task="t")
    with nullcontext() if message is None else pytest.warns(UserWarning, match=f"^1: has {message}"):
        model.save_task("t", tmp_path / "t.taps")


def test_a_base_that_was_loaded_after_it_was_wrapped(tmp_path) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    source, model = made(), TaskModel(made())
    source(torch.randn(5, 4))
    model.base.load_state_dict(source.state_dict())
    model.extract_task("t", source.state_dict())
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(source)
    fresh.load_task(tmp_path / "t.taps")
