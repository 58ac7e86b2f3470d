"""Drop-in layers in the place of a model's own: convert and revert, and what people do with models in between."""

from __future__ import annotations

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taps_ext import ConfigError, TapsConfig, TaskModel, UnsupportedModuleError
from taps_ext.nn import TapsConv2d, TapsLinear, convert, revert, sparsity_loss


def near(got: Tensor, want: Tensor) -> bool:
    """Up to the order of sums: three products of at most 72 terms, 64 roundings of the largest value."""
    return torch.allclose(got, want, rtol=0, atol=64 * torch.finfo(torch.float32).eps * want.abs().max().item())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.hidden = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.norm(self.conv(x)))))
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def opened(net: nn.Module, *closed: str) -> nn.Module:
    """Every layer converted but the head, with a Delta; those in `closed` closed."""
    names = convert(net, ["conv", "depthwise", "hidden"])
    assert names == ["conv", "depthwise", "hidden"]
    torch.manual_seed(2)
    with torch.no_grad():
        for name in names:
            layer = net.get_submodule(name)
            layer.delta.normal_(std=0.1)
            layer.score.fill_(0.0 if name in closed else 0.5)
    return net


def test_a_converted_model_is_the_model(net) -> None:
    """With the state that it starts with, bit for bit: Delta is zero."""
    want = net(images())
    assert convert(net) == ["conv", "depthwise", "hidden", "fc"]
    assert [type(net.get_submodule(name)) for name in ("conv", "fc")] == [TapsConv2d, TapsLinear]
    with torch.no_grad():
        assert torch.equal(net(images()), want)


@pytest.mark.parametrize("closed", [(), ("conv", "hidden")], ids=["open", "closed"])
def test_there_and_back(net, closed) -> None:
    plain, x = copy.deepcopy(net), images()
    model = opened(net, *closed)
    with torch.no_grad():
        out = model(x)
    back = copy.deepcopy(model)
    assert revert(back, merge=False) == ["conv", "depthwise", "hidden"]
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(back(x), plain(x)) and type(back.conv) is nn.Conv2d and type(back.hidden) is nn.Linear
    merged = copy.deepcopy(model)
    revert(merged)
    for name in ("conv", "depthwise", "hidden"):
        base, task = plain.get_submodule(name), merged.get_submodule(name)
        delta = model.get_submodule(name).delta
        assert torch.equal(task.weight, base.weight if name in closed else base.weight + delta)
    with torch.no_grad():  # fused products sum in another order
        assert near(merged(x), out)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.05), (0.05, 0.5)])
def test_a_score_that_no_call_has_seen_decides_what_is_merged(net, before, after) -> None:
    x, layer = images(), opened(net).hidden
    with torch.no_grad():
        layer.score.fill_(before)
        net(x)
        layer.score.data.fill_(after)
        want = copy.deepcopy(net)(x)
    revert(net)
    assert torch.equal(net(x), want)


def test_its_state_goes_into_the_stock_model(net) -> None:
    """Weights and biases keep their names, so that a stock model takes them; what is ours has names of its own."""
    plain = copy.deepcopy(net)
    model = opened(net)
    fresh = Net().eval()
    result = fresh.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys and all(".part." in key for key in result.unexpected_keys)
    assert torch.equal(fresh(images()), plain(images()))
    merged = copy.deepcopy(model)
    revert(merged)
    stock = Net().eval()
    stock.load_state_dict(merged.state_dict())
    assert torch.equal(stock(images()), merged(images()))
    again = copy.deepcopy(plain)
    convert(again, ["conv", "depthwise", "hidden"])
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_a_state_of_0_1_still_loads() -> None:
    layer = TapsLinear(3, 4)
    old = {"weight": torch.randn(4, 3), "bias": torch.randn(4), "delta": torch.randn(4, 3), "score": torch.tensor(0.5)}
    layer.load_state_dict(old)
    assert (
        torch.equal(layer.delta, old["delta"])
        and layer.score.item() == 0.5
        and torch.equal(layer.weight, old["weight"])
    )


def test_hooks_go_along(net) -> None:
    seen: list[str] = []
    handle = net.hidden.register_forward_hook(lambda *args: seen.append("before"))
    opened(net)
    net(images())
    assert seen == ["before"]
    handle.remove()
    handle = net.hidden.register_forward_hook(lambda *args: seen.append("between"))
    revert(net)
    net(images())
    assert seen == ["before", "between"]
    handle.remove()
    net.hidden.register_forward_pre_hook(lambda *args: seen.append("after"))
    net(images())
    assert seen == ["before", "between", "after"]


def test_compiled(net) -> None:
    model, x = opened(net, "hidden"), images()
    with torch.no_grad():
        want = model(x)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        got = compiled(x)
        assert near(got, want)
        model.hidden.score.fill_(0.5)  # the graph reads the score itself
        changed, eager = compiled(x), model(x)
        assert not torch.equal(changed, got)
        assert torch.allclose(
            changed, eager, rtol=0, atol=64 * torch.finfo(torch.float32).eps * eager.abs().max().item()
        )


def test_autocast_and_a_gradient_scaler(net) -> None:
    """The scaler's steps are those of a loop without it: its factors are powers of two, exact in these sizes."""
    model = opened(net, "depthwise").train()
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    y = torch.tensor([0, 1, 2, 3])
    losses = []
    for net_, scale in ((model, scaler), (other, None)):
        optimizer = torch.optim.SGD([p for p in net_.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net_(images()).float(), y) + sparsity_loss(net_, 0.1)
            if scale is None:
                loss.backward()
                optimizer.step()
            else:
                scale.scale(loss).backward()
                scale.step(optimizer)
                scale.update()
        losses.append(loss.item())
    assert model.conv.delta.dtype == torch.float32 and model.conv.delta.grad is not None
    assert model.depthwise.delta.grad is None  # closed: it rests
    assert losses[0] == pytest.approx(losses[1], rel=2**-7)  # bfloat16 rounds scaled gradients as it rounds others


def test_distributed(net) -> None:
    """DistributedDataParallel over a process of its own: gradients are those of the bare model."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        model = opened(net, "hidden").train()
        other = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for one in (wrapped, other):
            one(images()).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
    finally:
        torch.distributed.destroy_process_group()


def test_training_moves_what_is_ours_alone(net) -> None:
    model = opened(net).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model(images()).square().sum() + sparsity_loss(model, 1.0)).backward()
    optimizer.step()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {"conv.part.change.delta", "conv.part.gate.score", "fc.weight", "norm.weight"} <= moved
    assert not {"conv.weight", "conv.bias", "hidden.weight", "depthwise.weight"} & moved


def test_one_layer_under_two_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert convert(model) == ["0"] and model[0] is model[2] and isinstance(model[2], TapsLinear)
    assert revert(model) == ["0"] and model[0] is model[2] and type(model[0]) is nn.Linear


def test_what_cannot_be_converted_is_told(net) -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(UnsupportedModuleError, match="1: shares its weight with 0"):
        convert(tied)
    assert all(type(layer) is nn.Linear for layer in tied)  # nothing has changed
    with pytest.raises(ConfigError, match="patterns: pattern 'convs' matches no layer .did you mean 'conv'"):
        convert(net, ["convs"])
    with pytest.raises(ConfigError, match="patterns: expected a list of patterns, got 'conv'"):
        convert(net, "conv")
    with pytest.raises(ConfigError, match="model: expected a model with layers, got a Linear"):
        convert(nn.Linear(2, 2))
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModuleError, match=r"0\.linear1: a TransformerEncoderLayer .* reads"):
        convert(encoder)
    assert convert(encoder, ["1"]) == ["1"]  # and nothing had been done before
    model = TaskModel(net, TapsConfig(lam=0.1))
    model.add_task("birds", num_classes=3)
    for adapted in (model, model.base, nn.Sequential(model)):
        with pytest.raises(ConfigError, match="a TaskModel adapts"):
            convert(adapted)
    with pytest.raises(ConfigError, match="expected drop-in layers with learned gates, got none"):
        sparsity_loss(net, 1.0)


@pytest.mark.parametrize("make", [lambda: TapsLinear(6, 3, device="meta"), lambda: TapsConv2d(3, 4, 3, device="meta")])
def test_a_layer_on_meta_is_refused(make) -> None:
    """What `to_empty` gives it later would be no score."""
    with pytest.raises(ConfigError, match="weight: expected one on a device, got one on meta; build .* on the CPU"):
        make()
