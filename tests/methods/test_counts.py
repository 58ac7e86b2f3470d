"""The figures of patches, private layers and LoRA, from `report` and from the bytes of saved files."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from tolerance import bound, rms
from torch import Tensor, nn

from taps_ext import DepthwiseConfig, LoraConfig, MethodConfig, ScaleBiasConfig, SeparateLayersConfig, TaskModel, store

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def base_of(name: str) -> nn.Module:
    if name.startswith("vit"):
        return timm.create_model(name)
    return getattr(torchvision.models, name)()


def stored(model: TaskModel, path) -> dict[str, int]:
    """The elements of a task's file by role, and its statistics; its head is left out."""
    model.save_task("t", path)
    header = store.read_header(path)
    found = {"layers": 0, "norms": 0, "statistics": 0}
    for name, info in header.tensors.items():
        module, _, tensor = name.rpartition(":")
        kind = header.metadata.parts[module].facts["kind"]
        if kind != "instead" and tensor != "num_batches_tracked":
            own = "statistics" if tensor.startswith("running_") else "norms"
            found["layers" if kind == "layer" else own] += info.nbytes // 4
    return found


@pytest.mark.parametrize(
    ("name", "config", "norms", "layers"),
    [
        ("mobilenet_v2", ScaleBiasConfig(), 34_112, 0),
        ("mobilenet_v2", DepthwiseConfig(norm="frozen"), 0, 64_224),
        ("mobilenet_v2", DepthwiseConfig(), 34_112, 64_224),
        ("mobilenet_v2", ScaleBiasConfig(depthwise=True), 34_112, 64_224),
        ("resnet50", ScaleBiasConfig(), 53_120, 0),
        ("resnet34", ScaleBiasConfig(), 17_024, 0),
        ("resnet18", ScaleBiasConfig(), 9_600, 0),
        ("vit_small_patch16_224", ScaleBiasConfig(), 19_200, 0),
    ],
)
def test_patches(name: str, config: MethodConfig, norms: int, layers: int, tmp_path) -> None:
    model = TaskModel(base_of(name), config)
    model.add_task("t", num_classes=10)
    report = model.report("t")
    assert (report.norms, sum(row.own for row in report.rows), report.others) == (norms, layers, 0)
    assert report.parameters == norms + layers + report.head and report.bytes == 4 * layers
    statistics = 0 if name.startswith("vit") else norms  # a mean and a variance for every scale and bias
    assert stored(model, tmp_path / "t.taps") == {"layers": layers, "norms": norms, "statistics": statistics}


def test_shares_of_the_base(tmp_path) -> None:
    base = sum(p.numel() for p in base_of("mobilenet_v2").parameters())
    assert base == 3_504_872
    shares = [f"{100 * count / base:.3f}" for count in (34_112, 64_224, 34_112 + 64_224)]
    assert shares == ["0.973", "1.832", "2.806"]


@pytest.mark.parametrize(
    ("name", "stages", "weights"),
    [
        ("resnet50", ["conv1", "layer1"], 222_400),
        ("resnet50", ["conv1", "layer1", "layer2"], 1_434_816),
        ("resnet50", ["conv1", "layer1", "layer2", "layer3"], 8_512_704),
        ("resnet18", ["conv1", "layer1"], 156_864),
        ("resnet18", ["conv1", "layer1", "layer2"], 681_152),
        ("resnet18", ["conv1", "layer1", "layer2", "layer3"], 2_778_304),
    ],
)
def test_private_bottoms(name: str, stages: list[str], weights: int, tmp_path) -> None:
    base = base_of(name)
    layers = [n for n, m in base.named_modules() if isinstance(m, nn.Conv2d) and n.split(".")[0] in stages]
    share = weights / sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Conv2d))
    model = TaskModel(base)
    for task, config in {"t": {"bottom": len(layers)}, "same": {"fraction": share + 1e-9}}.items():
        model.add_task(task, num_classes=10, config=SeparateLayersConfig(**config))
        report = model.report(task)
        assert [row.layer for row in report.rows] == layers
        assert (report.open, sum(row.own for row in report.rows), report.bytes) == (weights, weights, 4 * weights)
    assert stored(model, tmp_path / "t.taps")["layers"] == weights


def test_a_top_below_the_last_convolution_holds_nothing() -> None:
    model = TaskModel(base_of("resnet50"))
    for fraction, weights in ((0.0447, 0), (0.0448, 1_048_576), (0.1452, 1_048_576), (0.1453, 1_048_576 + 2_359_296)):
        with (
            nullcontext()
            if weights
            else pytest.warns(UserWarning, match="chooses no layer from the top; .* is 0.044707")
        ):
            model.add_task("t", num_classes=2, config=SeparateLayersConfig(fraction=fraction, side="top"))
        assert model.report("t").open == weights
        model.delete_task("t")


# ------------------------------------------------------------------------------------ scale and bias


def _patched(statistics: str = "task") -> TaskModel:
    """Tasks "a" and "b" with equal patches that are not the base's."""
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()).requires_grad_(False), ScaleBiasConfig(statistics=statistics)).eval()
    for task in ("a", "b"):
        model.add_task(task)
    with torch.no_grad():
        for one, other in zip(model.state("a").parameters(), model.state("b").parameters(), strict=True):
            one += 0.1 * torch.randn_like(one)
            other.copy_(one)
        if statistics == "task":
            for one, other in zip(model.state("a").buffers(), model.state("b").buffers(), strict=True):
                if one.is_floating_point():
                    one *= 1 + 0.1 * torch.rand_like(one)
                other.copy_(one)
    return model


def test_a_patch_folds_into_the_convolution_before_it() -> None:
    """gamma / sqrt(var + eps) times its rows and a bias is the patched norm of its output, within 1e-6 of its size."""
    model, x = _patched(), images()
    plain = model.merge_and_unload("a")
    with torch.no_grad():
        conv, norm = plain.conv1, plain.bn1
        want = norm(conv(x))
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        got = F.conv2d(x, conv.weight * factor[:, None, None, None], norm.bias - factor * norm.running_mean, padding=1)
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())


def test_equal_patches_are_equal_tasks() -> None:
    model, x = _patched(), images()
    with torch.no_grad():
        assert torch.equal(model(x, task="a"), model(x, task="b"))
        assert not torch.equal(model(x, task="a"), model(x, task=None))


@pytest.mark.parametrize("statistics", ["task", "base"])
def test_a_step_of_one_task_leaves_the_statistics_of_another(statistics: str) -> None:
    model, x = _patched(statistics).train(), images()
    before = {task: copy.deepcopy(dict(model.state(task).state_dict())) for task in ("a", "b")}
    optimizer = torch.optim.SGD(model.parameter_groups("b", lr=0.1))
    model(x, task="b").square().mean().backward()
    optimizer.step()
    after = {task: model.state(task).state_dict() for task in ("a", "b")}
    assert all(torch.equal(tensor, before["a"][name]) for name, tensor in after["a"].items())
    moved = {name for name, tensor in after["b"].items() if not torch.equal(tensor, before["b"][name])}
    assert any("running_mean" in name for name in moved) == (statistics == "task")
    assert any(name.endswith("bn1.weight") for name in moved)


# ------------------------------------------------------------------------------------ LoRA


def _lora(host: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output under LoRA with a random B, and A and B."""
    base = nn.Sequential(host, nn.Flatten(), nn.Linear(host(x)[0].numel(), 2)).requires_grad_(False)
    model = TaskModel(base, LoraConfig(rank=3, alpha=6.0)).eval()
    found: list[Tensor] = []
    host.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model.add_task("t")
        change = model.state("t").table["0"].change
        change.up.normal_()
        model(x, task="t")
    return found[-1], change.down.detach(), change.up.detach()


def test_lora_is_the_papers_formula_for_linear() -> None:
    """W x + b + alpha / r * B A x (peft's, arXiv 2106.09685 section 4.1): the same products in the same order."""
    host = nn.Linear(7, 5).requires_grad_(False)
    x = torch.randn(4, 7)
    got, down, up = _lora(host, x)
    want = F.linear(x, host.weight, host.bias) + 6.0 / 3 * F.linear(F.linear(x, down), up)
    assert torch.equal(got, want)
    weight = host.weight.double() + 2.0 * up.double() @ down.double()
    limit = bound(torch.float32, 7, x, weight) + 2.0 * bound(torch.float32, 3, F.linear(x, down), up, outer=7)
    assert float((want.double() - F.linear(x.double(), weight, host.bias.double())).abs().max()) <= limit


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}, {"padding": "same"}]
)
def test_lora_is_the_papers_formula_for_convolutions(settings: dict) -> None:
    """peft's: A has the kernel and the geometry, B is 1 x 1."""
    host = nn.Conv2d(4, 5, 3, **settings).requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    got, down, up = _lora(host, x)
    geometry = (host.stride, host.padding, host.dilation)
    small = F.conv2d(x, down.view(3, 4, 3, 3), None, *geometry)
    want = F.conv2d(x, host.weight, host.bias, *geometry) + 2.0 * F.conv2d(small, up.view(5, 3, 1, 1))
    assert torch.equal(got, want)
    weight = host.weight.double() + 2.0 * (up.double() @ down.double()).view(5, 4, 3, 3)
    exact = F.conv2d(x.double(), weight, None if host.bias is None else host.bias.double(), *geometry)
    limit = bound(torch.float32, 36, x, weight) + 2.0 * bound(torch.float32, 3, small, up, outer=36)
    assert rms(want) > 0 and float((want.double() - exact).abs().max()) <= limit


@pytest.mark.parametrize("rank", [1, 4])
def test_lora_counts(rank: int, tmp_path) -> None:
    """r (K + N) for each layer without groups."""
    base = base_of("resnet18")
    sizes = {n: m.weight[0].numel() + len(m.weight) for n, m in base.named_modules() if isinstance(m, nn.Conv2d)}
    model = TaskModel(base, LoraConfig(rank=rank))
    model.add_task("t", num_classes=2)
    report = model.report("t")
    assert {row.layer: row.own for row in report.rows} == {name: rank * size for name, size in sizes.items()}
    assert stored(model, tmp_path / "t.taps") == {"layers": rank * sum(sizes.values()), "norms": 0, "statistics": 0}
