"""Norms folded into the layers before them: the same outputs, fewer modules, and a reason for each that stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, settle
from torch import Tensor, nn

from taps_ext import ConfigError, FullConfig, ScaleBiasConfig, TapsConfig, TaskModel, fold_norms


def patched(base: nn.Module, **settings) -> TaskModel:
    """A model in float64 with a task whose patch is not the base's."""
    model = TaskModel(settle(base).double().requires_grad_(False), ScaleBiasConfig(**settings)).eval()
    model.add_task("t", num_classes=5 if settings.get("last_layer", True) else None)
    with torch.no_grad():
        for tensor in (*model.state("t").parameters(), *model.state("t").buffers()):
            if tensor.is_floating_point():
                tensor *= 1 + 0.2 * torch.rand_like(tensor)
    return model


@pytest.mark.parametrize(("name", "norms"), [("mobilenet_v2", 52), ("resnet18", 20)])
@torch.no_grad()
def test_a_patched_net_without_norms(name: str, norms: int) -> None:
    """Every batch norm is gone, and outputs are those of the task within 1e-6 of their size, in float64."""
    torch.manual_seed(0)
    models = pytest.importorskip("torchvision").models
    model = patched(getattr(models, name)())
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    want, base = model(x, task="t"), model(x, task=None)
    found = fold_norms(model, (x[:1],), task="t")
    assert len(found.folded) == norms and not found.left
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in found.model.modules())
    got = found.model(x)
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    assert torch.equal(model(x, task="t"), want) and torch.equal(model(x, task=None), base)
    plain = model.merge_and_unload("t")
    again = fold_norms(plain, (x[:1],))
    assert torch.equal(again.model(x), got) and again.folded == found.folded
    assert sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) == norms


@torch.no_grad()
def test_the_layers_of_other_methods() -> None:
    """Weights that a task changed, biases, a linear layer with its norm; other norms are named."""

    class Net(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.bn2 = nn.BatchNorm1d(16, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.gn(self.conv2(x))).mean(dim=(2, 3))
            return self.fc(F.relu(self.ln(self.hidden(x))))

    torch.manual_seed(0)
    model = TaskModel(settle(Net()).double(), FullConfig(exclude_modules=["bn2", "depthwise"])).eval()
    model.add_task("t", num_classes=5)
    for parameter in model.state("t").parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = model(x, task="t")
    with model.use_task("t"):
        found = fold_norms(model, (x,))
    assert found.folded == {"bn1": "conv1"}
    assert found.left == {
        "gn": "it is a GroupNorm, no batch norm of torch's",
        "ln": "it is a LayerNorm, no batch norm of torch's",
        "bn2": "this forward does not run it",
    }
    assert float((found.model(x) - want).abs().max()) <= 1e-6 * float(want.abs().max())


class Two(nn.Module):
    """A layer and its norm, used in a way that `how` says."""

    def __init__(self, how: str, *, linear: bool = False) -> None:
        super().__init__()
        self.how = how
        self.layer: nn.Module = nn.Linear(4, 4) if linear else nn.Conv2d(4, 4, 1)
        norm = nn.BatchNorm1d if linear else nn.BatchNorm2d
        self.norm = norm(4, track_running_stats=how != "no statistics")

    def forward(self, x: Tensor) -> object:
        y = self.layer(x)
        if self.how == "in place":
            y.relu_()
        z = self.norm(y + 0 if self.how == "between" else y)
        if self.how == "skip":
            return z + y
        if self.how == "view":
            return z + y.flatten(1).mean()
        if self.how == "returned":
            return {"features": [y], "out": z}
        if self.how == "twice":
            return self.norm(z)
        if self.how == "layer twice":
            return self.layer(z)
        if self.how == "borrowed":
            return F.conv2d(z, self.layer.weight)
        return z


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("skip", "the result of layer before it is used elsewhere, too"),
        ("view", "the result of layer before it is used elsewhere, too"),
        ("returned", "the result of layer before it is used elsewhere, too"),
        ("in place", "the result of layer before it is used elsewhere, too"),
        ("between", "its input is not the result of a linear or convolution layer"),
        ("twice", "it runs 2 times in a forward"),
        ("layer twice", "layer before it runs 2 times in a forward"),
        ("borrowed", "the weight of layer before it is used elsewhere, too"),
        ("no statistics", "it has no running statistics, and computes them of its input"),
        ("hook", "layer has hooks"),
    ],
)
@torch.no_grad()
def test_what_is_not_folded(how: str, why: str) -> None:
    model, x = Two(how).eval(), torch.randn(2, 4, 3, 3)
    if how == "hook":
        model.layer.register_forward_hook(lambda module, args, output: output + 1)
    found = fold_norms(model, (x,))
    assert (found.folded, found.left) == ({}, {"norm": why})
    want, got = model(x), found.model(x)
    want, got = (value["out"] if isinstance(value, dict) else value for value in (want, got))
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_linear_layer_whose_norm_is_over_another_dimension() -> None:
    model = settle(Two("plain", linear=True)).eval()
    x = torch.randn(4, 4)
    found = fold_norms(model, (x,))
    want = model(x)
    assert found.folded == {"norm": "layer"}
    # four products and sums in either order, with a factor of at most 1.5 / sqrt(0.5)
    assert float((found.model(x) - want).abs().max()) <= 32 * torch.finfo(torch.float32).eps * float(want.abs().max())
    left = fold_norms(model, (torch.randn(3, 4, 4),)).left
    assert left == {"norm": "it does not normalise the outputs of layer before it"}


@torch.no_grad()
def test_a_module_with_two_names() -> None:
    class Once(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x))

    once = Once(nn.Conv2d(3, 4, 1), settle(nn.Sequential(nn.BatchNorm2d(4)))[0]).eval()
    once.alias = once[0]
    found, x = fold_norms(once, (torch.randn(1, 3, 2, 2),)), torch.randn(2, 3, 2, 2)
    assert found.model.alias is found.model[0] and found.model[0].bias is not None
    limit = 12 * 2**-24 * max(1.0, float(once(x).abs().max()))  # three products, a scale and a bias, rounded twice
    assert torch.allclose(found.model(x), once(x), rtol=0, atol=limit)


def test_mistakes_are_told() -> None:
    model, x = TaskModel(settle(TinyNet()), TapsConfig(lam=0.1)), torch.randn(1, 3, 8, 8)
    model.add_task("t", num_classes=3)
    for call, message in (
        (
            lambda: fold_norms(model.train(), (x,), task="t"),
            "model: expected one in evaluation mode, got training mode",
        ),
        (lambda: fold_norms(model.eval(), (x,)), "task: expected the name of a task, none being active"),
        (lambda: fold_norms(model.eval(), (x,), task="s"), "task: expected one of"),
        (
            lambda: fold_norms(model.eval(), x, task="t"),
            "inputs: expected a tuple of the forward's arguments, got Tensor",
        ),
        (lambda: fold_norms(settle(TinyNet()), (x,), task="t"), "task: expected none with a plain module, got 't'"),
        (lambda: fold_norms(lambda y: y, (x,)), "model: expected a module, got function"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    half = settle(TinyNet())
    half.bn1.train()
    with pytest.raises(ConfigError, match="expected all norms in evaluation mode, got bn1 in training mode"):
        fold_norms(half, (x,))
