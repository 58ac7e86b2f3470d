"""Bases whose forward builds buffers, or whose training runs modules that evaluation does not: their files load into a
fresh base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import BypassedLayerError, FullConfig, TapsConfig, TapsError, TaskFileError, TaskModel
from taps_ext.files.checkpoint import same_bits


class Positions(nn.Module):
    """Builds a table for the length of its input, anew where that changes; with `first` None there is none before."""

    def __init__(self, first: Tensor | None, keeps: bool = False, lasting: bool = False) -> None:
        super().__init__()
        self.proj, self.head, self.keeps = nn.Linear(4, 4), nn.Linear(4, 3), keeps
        self.register_buffer("table", first, persistent=lasting)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1]).to(self.proj.weight)[:, None] / 8
        if self.keeps:
            self.table = 0.9 * self.table + 0.1 * x.detach().mean((0, 2))[:, None]
        return self.head(F.relu(self.proj(x + self.table)).mean(1))


class LateTable(Positions):
    """Registers its table in the forward."""

    def __init__(self) -> None:
        super().__init__(None)
        del self.table

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self._buffers:
            self.register_buffer("table", None, persistent=False)
        return super().forward(x)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LateTable() if kind == "late" else Positions(None if kind == "none" else torch.zeros(1, 1))


def step(model: TaskModel, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1))
    model.train()(x, task="t").square().sum().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("first", ["train", "eval"])
@pytest.mark.parametrize("config", [TapsConfig(lam=0.1), FullConfig()], ids=["taps", "full"])
@pytest.mark.parametrize("kind", ["one", "none", "late"])
def test_a_file_loads_into_a_fresh_base(kind: str, config, first: str, tmp_path) -> None:
    """Into one that has run since it was adapted, too, for inputs of another size; moved, copied and merged."""
    x, other = torch.randn(2, 5, 4), torch.randn(2, 7, 4)
    model = TaskModel(make(kind), config).eval()
    whole = model.fingerprint()
    model.add_task("t", num_classes=2)
    if first == "eval":
        model(x, task="t"), model(x, task=None)
    step(model, x)
    step(model, other)
    with torch.no_grad():
        want = model(x, task="t"), model(other, task="t")
    for saved in (model, copy.deepcopy(model), model.double().float()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saved.save_task("t", tmp_path / "t.taps")
        assert saved.fingerprint() == whole
        for ran in (False, True):
            fresh = TaskModel(make(kind)).eval()
            if ran:
                fresh(torch.randn(1, 3, 4), task=None)
            fresh.load_task(tmp_path / "t.taps")
            with torch.no_grad():
                assert same_bits(fresh(x, task="t"), want[0]) and same_bits(fresh(other, task="t"), want[1])
    assert torch.equal(model.merge_and_unload("t")(x), want[0])


@pytest.mark.parametrize("fault", ["keeps", "lasting"])
def test_what_is_no_cache_is_refused(fault: str, tmp_path) -> None:
    """One whose values are not those of its shape, and one that a base's state holds."""
    model = TaskModel(Positions(torch.zeros(1, 1), **{fault: True}), TapsConfig(lam=0.1)).eval()
    model.add_task("t", num_classes=2)
    x = torch.randn(2, 5, 4)
    if fault == "lasting":
        with pytest.raises(TapsError, match="training wrote to the base's buffer table, which no task owns"):
            step(model, x)
        return
    step(model, x)
    step(model, x)
    with pytest.raises(TapsError, match="the base's buffer table has changed since the base was adapted"):
        model.save_task("t", tmp_path / "t.taps")


def test_a_base_that_ran_before_is_another_one_and_the_message_says_what_to_do(tmp_path) -> None:
    def made(ran: bool) -> TaskModel:
        base = make("one").eval()
        if ran:
            base(torch.randn(1, 5, 4))
        return TaskModel(base, TapsConfig(lam=0.1)).eval()

    x = torch.randn(2, 5, 4)
    for ran in (False, True):
        model = made(ran)
        model.add_task("t", num_classes=2)
        step(model, x)
        model.save_task("t", tmp_path / "t.taps")
        with pytest.raises(TaskFileError, match="if a forward builds .table., take a base that had run before"):
            made(not ran).load_task(tmp_path / "t.taps")
        same = made(ran)
        same.load_task(tmp_path / "t.taps")
        with torch.no_grad():
            assert same_bits(same(x, task="t"), model(x, task="t"))


def test_timms_convit(tmp_path) -> None:
    timm = pytest.importorskip("timm")

    def convit() -> nn.Module:
        torch.manual_seed(0)
        size = {"img_size": 32, "embed_dim": 48, "depth": 3, "local_up_to_layer": 2}
        return timm.create_model("convit_tiny", num_classes=5, **size).eval()

    x = torch.randn(2, 3, 32, 32)
    model = TaskModel(convit(), TapsConfig(lam=0.1))
    model.add_task("t", num_classes=3)
    step(model, x)
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(convit()).eval()
    fresh.load_task(tmp_path / "t.taps")
    with torch.no_grad():
        assert same_bits(fresh(x, task="t"), model(x, task="t"))


class Auxiliary(nn.Module):
    """Another classifier while it trains, as torchvision's GoogLeNet and Inception have."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor):
        x = F.relu(self.body(x))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def googlenet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.googlenet(weights=None, num_classes=4, init_weights=False, aux_logits=True)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("remedy", ["train", "exclude"])
@pytest.mark.parametrize(("kind", "aux"), [(Auxiliary, ["aux"]), (googlenet, ["aux1*", "aux2*"])])
def test_modules_that_only_training_runs_evaluated_first(kind, aux, remedy: str, evaluated: bool, tmp_path) -> None:
    """Both remedies that the message names work, also of a task that is saved before its trained values ran."""
    torch.manual_seed(0)
    base = kind().eval()
    twin = copy.deepcopy(base)
    x = torch.randn(3, 4) if kind is Auxiliary else torch.randn(2, 3, 64, 64)
    model = TaskModel(base, TapsConfig(lam=0.1), head_module="fc").eval()
    model.add_task("t", num_classes=2)
    with pytest.raises(
        BypassedLayerError, match=r"run one forward in train\(\) mode first; .* or name them in exclude"
    ):
        model(x, task="t")
    if remedy == "exclude":
        model.delete_task("t")
        model.add_task("t", num_classes=2, config=TapsConfig(lam=0.1, exclude_modules=aux))
        model(x, task="t")
    optimizer = torch.optim.SGD(model.parameter_groups(lr=0.01))
    sum(output.square().sum() for output in model.train()(x, task="t")).backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        if evaluated:
            model(x, task="t")
        model.save_task("t", tmp_path / "t.taps")
        for name in ("t", "again"):  # loaded, saved and loaded
            fresh = TaskModel(copy.deepcopy(twin), head_module="fc").eval()
            fresh.load_task(tmp_path / "t.taps")
            fresh.save_task("t", tmp_path / "t.taps")
            assert same_bits(fresh(x, task="t"), model(x, task="t")), name
