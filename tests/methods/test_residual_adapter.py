"""Residual adapters: what the papers' 1 x 1 convolutions compute, from one folded weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_cases import images, make_base, output, trained
from tolerance import bound
from torch import Tensor, nn

from taps_ext import ConfigError, ResidualAdapterConfig, TaskModel, store
from taps_ext.parts import Gate, Layer, ParallelAdapter, SeriesAdapter
from taps_ext.parts.part import Below

torchvision = pytest.importorskip("torchvision")


def _run(host: nn.Conv2d, mode: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output under a random adapter, and A in float64."""
    torch.manual_seed(0)
    host.requires_grad_(False)
    change = (ParallelAdapter if mode == "parallel" else SeriesAdapter)(host)
    part = Layer(Gate(learn=False), change)
    with torch.no_grad():
        change.adapter.normal_()
        return part(Below(host), x), change.adapter.double()


def _exact(host: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if host.bias is None else host.bias.double()
    padded = F.pad(x.double(), host._reversed_padding_repeated_twice, mode="constant")
    return F.conv2d(padded, host.weight.double(), bias, host.stride, 0, host.dilation)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": 1, "stride": 2, "bias": False},
        {"padding": 2, "dilation": 2},
        {"padding": "same"},
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": (1, 2)},
    ],
)
def test_parallel_is_a_convolution_beside(settings: dict) -> None:
    """Of the same stride. K products, of which C are with a sum."""
    torch.manual_seed(1)
    host, x = nn.Conv2d(4, 6, **{"kernel_size": 3, **settings}), torch.randn(2, 4, 9, 10)
    got, adapter = _run(host, "parallel", x)
    want = _exact(host, x) + F.conv2d(x.double(), adapter[:, :, None, None], stride=host.stride)
    limit = bound(torch.float32, host.weight[0].numel(), x, host.weight) + bound(torch.float32, 2 * 4, x, adapter)
    assert got.shape == want.shape and float((got.double() - want).abs().max()) <= limit


def test_parallel_sees_the_middle_of_a_window() -> None:
    """Also where nothing is padded."""
    host, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9)
    got, adapter = _run(host, "parallel", x)
    want = _exact(host, x) + F.conv2d(x.double(), adapter[:, :, None, None])[..., 1:-1, 1:-1]
    limit = bound(torch.float32, 36, x, host.weight) + bound(torch.float32, 2 * 4, x, adapter)
    assert float((got.double() - want).abs().max()) <= limit


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2, "bias": False}, {"kernel_size": 4, "stride": 4}])
def test_series_is_a_convolution_behind(settings: dict) -> None:
    """z + A z with the layer's bias in z: W_t is K sums of O products, and so is the bias."""
    torch.manual_seed(1)
    host, x = nn.Conv2d(4, 6, **{"kernel_size": 3, **settings}), torch.randn(2, 4, 9, 9)
    got, adapter = _run(host, "series", x)
    plain = _exact(host, x)
    want = plain + F.conv2d(plain, adapter[:, :, None, None])
    terms = host.weight[0].numel()
    around = torch.eye(6, dtype=torch.float64) + adapter
    limit = bound(torch.float32, terms, x, around @ host.weight.double().flatten(1))
    limit += bound(torch.float32, 6, x, around, host.weight, outer=terms)
    if host.bias is not None:
        limit += bound(torch.float32, 6, around, host.bias)
    assert float((got.double() - want).abs().max()) <= limit


def test_series_acts_on_the_bias_wherever_it_goes() -> None:
    """Run, merged, in a plain model, and compiled: bit for bit."""
    model, x = trained("small", "adapter-series"), images("small")
    want = output(model, x, "t")
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x, task="t"), want)
    tensors, bias = model.task_state_dict("t"), model.base.get_submodule("conv").bias.clone()
    model.merge_task("t")
    assert torch.equal(output(model, x, "t"), want)
    model.unmerge_task()
    assert torch.equal(output(model, x), output(make_base("small"), x))
    plain = model.merge_and_unload("t")
    own = plain.get_submodule("conv").bias
    assert torch.equal(tensors["conv.bias"], own) and not torch.equal(own, bias)
    assert torch.equal(output(plain, x), want)


def test_series_bias_behind_a_learned_gate() -> None:
    """The score's derivative is <G, opened - closed> of weight and bias together, in float32 as the score is, whose
    roundings are one each and one of their sum; closed, the bias is the base's."""
    host = nn.Conv2d(3, 4, 3, dtype=torch.float64).requires_grad_(False)
    part = Layer(Gate(), SeriesAdapter(host))
    torch.manual_seed(0)
    with torch.no_grad():
        part.change.adapter.normal_()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    opened = part(Below(host), x)
    opened.sum().backward()
    difference = opened.detach() - host(x)
    limit = 2 * torch.finfo(torch.float32).eps * float(difference.abs().sum())
    assert abs(part.gate.score.grad.item() - float(difference.sum())) <= limit
    part.gate.known = False
    with torch.no_grad():
        assert torch.equal(part(Below(host), x), host(x))


def _counts(name: str, mode: str) -> int:
    convs = [m for m in getattr(torchvision.models, name)().modules() if isinstance(m, nn.Conv2d)]
    plain = [m for m in convs if m.groups == 1 and m.kernel_size != (1, 1)]
    return sum(m.out_channels * (m.in_channels if mode == "parallel" else m.out_channels) for m in plain)


@pytest.mark.parametrize(
    ("name", "mode", "values"),
    [
        ("resnet18", "parallel", 1_220_800),
        ("resnet18", "series", 1_396_736),
        ("resnet50", "parallel", 1_257_664),
        ("resnet50", "series", 1_261_568),
    ],
)
def test_counts(name: str, mode: str, values: int, tmp_path: Path) -> None:
    """sum C O and sum O^2, from `report` and from the bytes of a file."""
    model = TaskModel(getattr(torchvision.models, name)(), ResidualAdapterConfig(mode=mode))
    model.add_task("t", num_classes=10)
    report = model.report("t")
    assert sum(row.own for row in report.rows) == values == _counts(name, mode) and report.bytes == 4 * values
    model.save_task("t", tmp_path / "t.taps")
    tensors = store.read_header(tmp_path / "t.taps").tensors
    assert sum(info.nbytes for n, info in tensors.items() if n.endswith(":adapter")) == 4 * values


@pytest.mark.parametrize(
    ("kind", "host"),
    [
        (ParallelAdapter, nn.Conv2d(4, 4, 2)),
        (ParallelAdapter, nn.Conv2d(4, 4, 3, groups=2)),
        (ParallelAdapter, nn.Linear(4, 4)),
        (SeriesAdapter, nn.Conv2d(4, 4, 3, groups=2)),
    ],
)
def test_hosts_that_have_no_place_for_it(kind: type, host: nn.Module) -> None:
    with pytest.raises(ValueError, match="host: expected"):
        kind(host)


def test_a_base_that_has_no_place_for_it() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(ConfigError, match="no convolution without groups and with a kernel of odd size above 1x1"):
        TaskModel(patches).add_task("t", config=ResidualAdapterConfig())
    TaskModel(patches).add_task("t", config=ResidualAdapterConfig(mode="series"))
    with pytest.raises(ConfigError, match="mode: expected one of"):
        ResidualAdapterConfig(mode="serial")
