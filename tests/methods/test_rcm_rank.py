"""Reparameterised convolutions that keep a rank of their responses' axes, and the mean that the others took along."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_cases import images, make_base, output, state_of, train
from models import TinyNet, settle
from torch import Tensor, nn

from taps_ext import ConfigError, RcmConfig, TapsError, TaskModel, store
from taps_ext.methods import rcm

EPS = torch.finfo(torch.float32).eps


class Flat(nn.Module):
    """A convolution whose responses lie in two dimensions around a mean that is not zero, for images with a first
    channel of ones. `norm`: a batch norm behind it; `bias`: of its own."""

    def __init__(self, *, norm: bool, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2, bias=bias)
        with torch.no_grad():
            plane = torch.linalg.qr(torch.randn(6, 6))[0][:, :2]
            self.conv.weight[:, 1:] = (plane @ torch.randn(2, 2 * 4)).view(6, 2, 2, 2)
            self.conv.weight[:, 0] = torch.randn(6, 2, 2)
        self.norm = settle(nn.Sequential(nn.BatchNorm2d(6)))[0] if norm else nn.Identity()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


def flat(**settings: bool) -> Flat:
    torch.manual_seed(0)
    return Flat(**settings).double().eval()


def flat_images(seed: int = 1) -> Tensor:
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1.0
    return x


def ranked(base: nn.Module, batches: list[Tensor], **settings: object) -> TaskModel:
    model = TaskModel(base, RcmConfig(start="response", **settings)).eval()
    rcm.prepare(model, batches)
    model.add_task("t")
    return model


def _limit(model: TaskModel, x: Tensor) -> float:
    """How far the rounding of axes, modulators and mean to float32 may move the responses: O of them, eps each, in two
    matrices and a vector."""
    with torch.no_grad():
        return 6 * 3 * EPS * float(model.base.conv(x).abs().max()) * 2.2  # by the norm's scale, at most 1.5 / sqrt(0.5)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("norm", "bias"), [(True, False), (False, True), (True, True)])
@torch.no_grad()
def test_two_axes_are_enough_for_responses_in_two_dimensions(norm: bool, bias: bool, normalise: bool) -> None:
    """Of batches that were not seen, too; and the mean is right in sign: with the other one the task is wrong by twice
    the lost mean, as the paper's code is."""
    model = ranked(flat(norm=norm, bias=bias), [flat_images()], rank=2, normalise=normalise)
    state, x = model.state("t"), flat_images(2)
    want = model.base.fc.weight.abs().sum(1).max()  # of the head behind it
    assert float((model(x, task="t") - model(x, task=None)).abs().max()) <= float(want) * _limit(model, x)
    layer = state.table["conv"]
    assert layer.change.matrix.shape == (6, 2) and (layer.bias is not None) == bias
    if bias:
        lost = layer.bias - model.base.conv.bias
        layer.bias -= 2 * lost
    else:
        lost = model.base.norm.running_mean - state.table["norm"].running_mean
        state.table["norm"].running_mean += 2 * lost
    assert float(lost.abs().max()) > 0.1
    assert float((model(x, task="t") - model(x, task=None)).abs().max()) > 0.1


@torch.no_grad()
def test_the_wrong_sign_hides_in_training() -> None:
    """A batch's own statistics take any constant out, in either sign, up to what float64 rounds of it."""
    model = ranked(flat(norm=True, bias=False), [flat_images()], rank=2).train()
    x, norm = flat_images(2), model.state("t").table["norm"]
    want = model(x, task="t")
    norm.running_mean.copy_(2 * model.base.norm.running_mean + 1.0)
    assert torch.equal(model(x, task="t"), want)


@pytest.mark.parametrize("rank", [1, 3])
@torch.no_grad()
def test_the_mean_of_the_responses_is_restored(rank: int) -> None:
    """Against float64: W_t = M (U_r^T W) of the axes as they are rounded, and its mean response over the batches with b
    added is the base's, but for the mean's rounding to float32."""
    base = settle(TinyNet()).double()
    batches = [torch.randn(6, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    model = ranked(base, batches, rank=rank, exclude_modules=["depthwise"])
    state, (family,) = model.state("t"), model.families.values()
    assert list(family.table) == ["conv1", "conv2"]
    x, inputs = torch.cat(batches), {}
    for name in family.table:
        hook = base.get_submodule(name).register_forward_hook(
            lambda m, args, y, name=name: inputs.update({name: args[0]})
        )
        model(x, task=None)
        hook.remove()
    for name, own in state.table.items():
        if name not in family.table:
            continue
        host, axes = base.get_submodule(name), family.table[name].change
        weight, matrix = host.weight.flatten(1), own.change.whole(torch.float64)[0]
        folded = matrix @ (axes.matrix.double()[:rank] @ weight)
        assert torch.allclose(model.task_state_dict("t")[f"{name}.weight"].flatten(1), folded, rtol=0, atol=1e-14)
        kernel = folded.view_as(host.weight)
        plain, low = (F.conv2d(inputs[name], w, None, host.stride, host.padding) for w in (host.weight, kernel))
        added = (
            own.bias - host.bias if own.bias is not None else base.bn1.running_mean - state.table["bn1"].running_mean
        )
        missing = (plain - low).mean((0, 2, 3))
        assert float(missing.abs().max()) > 0.01
        assert float((added - missing).abs().max()) <= 2 * EPS * float(plain.mean((0, 2, 3)).abs().max()) * len(weight)


@torch.no_grad()
def test_a_full_rank_is_exact() -> None:
    """As RcmConfig(start="response") without one, bit for bit: no mean is lost, and no norm or bias is touched."""
    models = []
    for settings in ({"rank": 12}, {}):
        model = TaskModel(make_base("conv"), RcmConfig(start="response", **settings)).eval()
        rcm.prepare(model, [images("conv")])
        model.add_task("t")
        models.append(model)
    x = images("conv")
    assert torch.equal(*(output(model, x, "t") for model in models))
    state = models[0].state("t")
    for name in ("norm", "norm2", "norm3"):
        assert torch.equal(state.table[name].running_mean, models[0].base.get_submodule(name).running_mean)
    want = output(models[0], x)
    assert float((output(models[0], x, "t") - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert not any("bias" in part.roles() for part in state.table.values())


@pytest.mark.parametrize("normalise", [True, False])
def test_counts(normalise: bool, tmp_path: Path) -> None:
    """O * min(rank, O / groups) values a layer, and as many gains as rows; the family has the axes and the means."""
    model = ranked(make_base("conv"), [images("conv")], rank=4, normalise=normalise)
    sizes = {"stem": 8 * 4, "depthwise": 8 * 1, "grouped": 12 * 4}
    rows = {"stem": 8, "depthwise": 8, "grouped": 12}
    report = model.report("t")
    assert {row.layer: row.own for row in report.rows} == {n: s + normalise * rows[n] for n, s in sizes.items()}
    assert {row.change for row in report.rows} == {"low-modulator"}
    assert report.others == 12  # the bias of "grouped"
    assert report.shared == 8 * 8 + 8 * 1 + 12 * 6 + 8 + 8 + 12
    model.save_shared("rcm", tmp_path / "axes.taps")
    model.save_task("t", tmp_path / "t.taps")
    header = store.read_header(tmp_path / "t.taps")
    assert {n: header.tensors[f"{n}:matrix"].nbytes for n in sizes} == {n: 4 * size for n, size in sizes.items()}


def test_it_trains_is_saved_and_found_again(tmp_path: Path) -> None:
    """Also by a task that is added to the family's file, which starts with the same bits; of another rank, too."""
    model, x = ranked(make_base("conv"), [images("conv")], rank=4), images("conv")
    (family,) = model.families.values()
    start, before = output(model, x, "t"), state_of(family)
    model.add_task("low", config=RcmConfig(start="response", rank=2))
    assert model.state("low").family is family
    low = output(model, x, "low")
    losses = train(model, x, "t")
    assert losses[-1] < losses[0] and all(torch.equal(t, before[n]) for n, t in state_of(family).items())
    want = output(model.eval(), x, "t")
    model.save_shared("rcm", tmp_path / "axes.taps")
    model.save_task("t", tmp_path / "t.taps")
    model.merge_task("t")
    merged = output(model, x, "t")
    assert torch.equal(merged, want)
    fresh = TaskModel(make_base("conv"), RcmConfig(start="response", rank=4)).eval()
    fresh.load_task(tmp_path / "t.taps")
    assert torch.equal(output(fresh, x, "t"), want)
    fresh.add_task("late")
    fresh.add_task("low", config=RcmConfig(start="response", rank=2))
    assert torch.equal(output(fresh, x, "late"), start) and torch.equal(output(fresh, x, "low"), low)
    plain = fresh.merge_and_unload("t").requires_grad_(False)
    assert torch.equal(output(plain, x), want)


def test_a_row_of_zeros_has_gradients() -> None:
    """Normalised, and before any axes: 0 / 0 is none."""
    from taps_ext.parts import LowModulator

    host = nn.Conv2d(3, 4, 2).requires_grad_(False)
    change = LowModulator(host, rank=2, normalise=True)
    change.fold(host.weight).square().sum().backward()
    assert change.gain.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert all(bool(torch.isfinite(p.grad).all()) for p in change.parameters())
    assert torch.equal(change.fold(host.weight)[2:], torch.zeros(2, 3, 2, 2))


# ------------------------------------------------------------------------------------ mistakes


class Apart(TinyNet):
    """bn1 follows conv1 in the order of modules, and reads something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(F.relu(self.gn(self.conv2(self.bn1(F.relu(self.conv1(x)))))).mean((2, 3))))


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    config = RcmConfig(start="response", rank=2, exclude_modules=["depthwise"])
    with pytest.raises(
        ConfigError, match="rank 2: conv1 has neither a bias nor a batch norm that alone reads its result"
    ):
        rcm.prepare(TaskModel(settle(Apart()), config), [x])
    with pytest.raises(ConfigError, match="rank 2: depthwise has neither a bias nor a batch norm"):
        plain = TinyNet()
        plain.depthwise = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        rcm.prepare(TaskModel(settle(plain), RcmConfig(start="response", rank=2)), [x])
    model = TaskModel(settle(TinyNet()), config)
    with pytest.raises(ConfigError, match="the axes of conv1's responses are not known yet; call rcm.prepare"):
        model.add_task("t")
    assert not model.tasks
    with pytest.raises(ConfigError, match="batches: expected some, got none"):
        rcm.prepare(model, [])
    with pytest.raises(ConfigError, match="batches: expected finite responses of 'conv1'"):
        rcm.prepare(model, [torch.full_like(x, torch.inf)])
    with pytest.raises(ConfigError, match="are not known yet"):
        model.add_task("t")
    rcm.prepare(model, [x])
    model.add_task("t")
    with pytest.raises(TapsError, match="prepare: tasks build on the family already"):
        rcm.prepare(model, [x])
    with pytest.raises(TapsError, match="initialise: the family's tasks keep a rank of its axes; call prepare"):
        rcm.initialise(model, {})
    with pytest.raises(ConfigError, match=r"config: expected RcmConfig\(start=\"response\"\)"):
        rcm.prepare(TaskModel(settle(TinyNet())), [x])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "start": "response"}, "rank: expected an int >= 1 or None, got 0"),
        ({"rank": True, "start": "response"}, "rank: expected an int >= 1 or None, got True"),
        ({"rank": 4}, 'rank: expected start="response" beside it'),
    ],
)
def test_bad_ranks(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RcmConfig(**settings)


def test_a_family_before_its_tasks() -> None:
    model = TaskModel(settle(TinyNet()))
    with pytest.raises(ConfigError, match="config: expected a method config"):
        model.add_family()
    with pytest.raises(ConfigError, match="config: method 'rcm' has no shared parts as it is set"):
        model.add_family(RcmConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family = model.add_family(RcmConfig(start="response"))
    assert model.add_family(RcmConfig(start="response")) is family and list(model.families) == ["rcm"]
    model.add_task("t", config=RcmConfig(start="response"))
    assert model.state("t").family is family
