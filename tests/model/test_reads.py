"""Layers whose weights are read by others, or by a forward of their own: the task's weight is what they see."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor, nn

from taps_ext import BypassedLayerError, FullConfig, TapsConfig, TaskModel


class PaddedConv(nn.Conv2d):
    """Pads in a forward of its own, as timm's Conv2dSame does."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, [0, 1, 0, 1]), self.weight, self.bias, self.stride)


class StandardisedConv(nn.Conv2d):
    """Computes with its weight before it convolves: the gated ops cannot serve it."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean(dim=(1, 2, 3), keepdim=True)) * 2.0
        return F.conv2d(input, weight, self.bias, padding=1)


class Net(nn.Module):
    """`read` has its weight handed to a function; its dtype is asked for as well, as mixed-precision code does."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = PaddedConv(3, 6, 2, stride=2)
        self.standardised = StandardisedConv(6, 5, 3)
        self.read = nn.Linear(5, 7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardised(F.gelu(self.padded(x))).mean((2, 3))
        x = x.to(self.read.weight.dtype)
        return self.fc(F.linear(x, self.read.weight, self.read.bias))


LAYERS = ("padded", "standardised", "read")


def make(config: object = None, gates: str = "host") -> tuple[nn.Module, TaskModel]:
    torch.manual_seed(0)
    base = Net().eval()
    model = TaskModel(copy.deepcopy(base), config or TapsConfig(lam=1.0), gates=gates)
    model.add_task("t", num_classes=4)
    return base, model


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def parts(model: TaskModel) -> dict[str, nn.Module]:
    return {name: part for name, part, _ in model.state("t").gated()}


@torch.no_grad()
def fill(model: TaskModel, names: tuple[str, ...] = LAYERS) -> None:
    for name, part in parts(model).items():
        part.change.delta.copy_(
            torch.randn(part.change.delta.shape, generator=torch.Generator().manual_seed(len(name)))
        )
        part.gate.score.fill_(0.15 if name in names else 0.05)


def reference(base: nn.Module, model: TaskModel, x: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and dL/dW_t of each layer, in float64 by plain torch on the merged weights."""
    plain = copy.deepcopy(base).double()
    plain.fc = copy.deepcopy(model.state("t").head).double()
    for name, part in parts(model).items():
        if part.gate.score >= 0.1:
            plain.get_submodule(name).weight.data += part.change.delta.detach().double()
    y = plain(x.double())
    y.backward(upstream.double())
    return y.detach(), {name: plain.get_submodule(name).weight.grad for name in LAYERS}


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("opened", [LAYERS, *[(name,) for name in LAYERS], ()])
def test_values_and_gradients(opened: tuple[str, ...], gates: str) -> None:
    base, model = make(gates=gates)
    fill(model, opened)
    x = images()
    upstream = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    model.train()
    y = model(x, task="t")
    y.backward(upstream)
    want, gradient = reference(base, model, x, upstream)
    # Every value passes through four layers of at most 54 terms; norms of the layers after it bound its errors.
    scale = torch.tensor([float(want.abs().max())])
    assert_close(y, want, torch.float32, 4 * 54, scale)
    for name, part in parts(model).items():
        g, delta = gradient[name], part.change.delta.detach()
        scale = torch.tensor([float(g.abs().max())])
        assert_close(
            part.gate.score.grad, (g * delta.double()).sum(), torch.float32, 4 * 80, scale, delta, outer=g.numel()
        )
        if name in opened:
            assert_close(part.change.delta.grad, g, torch.float32, 4 * 80, scale)
        else:
            assert part.change.delta.grad is None or not part.change.delta.grad.any()


def test_closed_is_the_base_bit_for_bit() -> None:
    base, model = make()
    with torch.no_grad():
        for part in parts(model).values():
            part.change.delta.fill_(float("nan"))
            part.gate.score.fill_(0.0)
    model.eval()
    x = images()
    plain = copy.deepcopy(base)
    plain.fc = model.state("t").head
    with torch.no_grad():
        assert torch.equal(model(x, task="t"), plain(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model.unload()(x), base(x))


def test_merged_and_saved_are_the_same(tmp_path) -> None:
    base, model = make()
    fill(model)
    model.eval()
    x = images()
    with torch.no_grad():
        want = model(x, task="t")
        model.save_task("t", tmp_path / "t.taps")
        model.merge_task("t")
        scale = torch.tensor([float(want.abs().max())])  # BLAS may round by where a weight happens to lie
        assert_close(model(x, task="t"), want.double(), torch.float32, 4 * 54, scale)
        model.unmerge_task()
        assert torch.equal(model(x, task="t"), want)
        fresh = TaskModel(base, TapsConfig(lam=1.0)).eval()
        fresh.load_task(tmp_path / "t.taps")
        assert torch.equal(fresh(x, task="t"), want)
        plain = copy.deepcopy(model).merge_and_unload("t")
    assert not any("taps" in type(m).__module__ for m in plain.modules())
    assert_close(plain(x), want.double(), torch.float32, 4 * 54, scale)


def test_full_config_trains_what_is_read() -> None:
    _, model = make(FullConfig())
    model.train()
    model(images(), task="t").square().sum().backward()
    for part in parts(model).values():
        assert part.change.delta.grad.abs().max() > 0
        assert part.bias.grad.abs().max() > 0


def test_autocast_reads() -> None:
    _, model = make()
    fill(model)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(), task="t")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(part.change.delta.grad.abs().max() > 0 for part in parts(model).values())


def test_compiled_reads_equal_eager() -> None:
    _, model = make(gates="device")
    fill(model)
    model.eval()
    x = images()
    with torch.no_grad():
        want = model(x, task="t")
        got = torch.compile(model)(x, task="t")
    scale = torch.tensor([float(want.abs().max())])
    assert_close(got, want.double(), torch.float32, 4 * 54, scale)


class OnlyAsks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.asked = nn.Linear(3, 3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.asked.weight.dtype, copy=True) * self.asked.weight.shape[0])


def test_asking_for_facts_is_not_using() -> None:
    model = TaskModel(OnlyAsks(), TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    with pytest.raises(BypassedLayerError, match="asked"):
        model.train()(torch.randn(1, 3), task="t")


# --- attention ------------------------------------------------------------------------------------------------------


def encoder(config: object = None, gates: str = "host") -> tuple[nn.Module, TaskModel]:
    """A transformer encoder layer: attention with a joint projection, linear layers, norms; two fused fast paths."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base = nn.Sequential(layer, nn.Linear(8, 4)).eval()
    model = TaskModel(copy.deepcopy(base), config or TapsConfig(lam=1.0), gates=gates)
    model.add_task("t", num_classes=4)
    return base, model


ENCODER = ("0.self_attn", "0.self_attn.out_proj", "0.linear1", "0.linear2")


def tokens() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def attention_reference(base: nn.Module, model: TaskModel, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    plain = copy.deepcopy(base).double().train()
    plain[1] = copy.deepcopy(model.state("t").head).double()
    named = dict(plain.named_parameters())
    keys = {name: f"{name}.in_proj_weight" if name.endswith("self_attn") else f"{name}.weight" for name in ENCODER}
    for name, part in parts(model).items():
        if part.gate.score >= 0.1:
            named[keys[name]].data += part.change.delta.detach().double()
    y = plain(tokens().double())
    y.backward(upstream.double())
    return y.detach(), {name: named[key].grad for name, key in keys.items()}


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("opened", [ENCODER, *[(name,) for name in ENCODER], ()])
def test_attention_values_and_gradients(opened: tuple[str, ...], gates: str) -> None:
    base, model = encoder(gates=gates)
    fill(model, opened)
    assert tuple(parts(model)) == ENCODER
    upstream = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    model.train()
    y = model(tokens(), task="t")
    y.backward(upstream)
    want, gradient = attention_reference(base, model, upstream)
    terms = 8 * (24 + 8 + 16 + 16 + 4)  # at most: every product on the way to one output
    assert_close(y, want, torch.float32, terms, torch.tensor([float(want.abs().max())]))
    for name, part in parts(model).items():
        g, delta = gradient[name], part.change.delta.detach()
        scale = torch.tensor([float(g.abs().max())])
        want_score = (g * delta.double()).sum()
        assert_close(part.gate.score.grad, want_score, torch.float32, terms, scale, delta, outer=g.numel())
        if name in opened:
            assert_close(part.change.delta.grad, g, torch.float32, terms, scale)
        else:
            assert part.change.delta.grad is None or not part.change.delta.grad.any()
    with torch.no_grad():  # in evaluation the fused paths are not taken for an open layer, or see its weights
        assert_close(
            model.eval()(tokens(), task="t"), want, torch.float32, terms, torch.tensor([float(want.abs().max())])
        )


def test_closed_attention_is_the_base_bit_for_bit() -> None:
    base, model = encoder()
    with torch.no_grad():
        for part in parts(model).values():
            part.change.delta.fill_(float("nan"))
            part.gate.score.fill_(0.0)
    plain = copy.deepcopy(base)
    plain[1] = model.state("t").head
    model.eval()
    with torch.no_grad():  # the fused path
        assert torch.equal(model(tokens(), task="t"), plain(tokens()))
        assert torch.equal(model(tokens()), base(tokens()))
    assert torch.equal(model.unload()(tokens()), base(tokens()))


def test_attention_merges_and_reloads(tmp_path) -> None:
    base, model = encoder()
    fill(model)
    model.eval()
    want = model(tokens(), task="t").detach()
    model.save_task("t", tmp_path / "t.taps")
    fresh = TaskModel(base, TapsConfig(lam=1.0)).eval()
    fresh.load_task(tmp_path / "t.taps")
    assert torch.equal(fresh(tokens(), task="t"), want)
    plain = copy.deepcopy(model).merge_and_unload("t")
    scale = torch.tensor([float(want.abs().max())])  # BLAS may round by where a weight happens to lie
    assert_close(plain(tokens()), want.double(), torch.float32, 8 * 68, scale)
    assert type(plain[0].self_attn) is nn.MultiheadAttention
    model.merge_task("t")
    assert_close(model(tokens(), task="t"), want.double(), torch.float32, 8 * 68, scale)
    with torch.no_grad():  # fused, as the plain model is
        assert_close(model(tokens(), task="t"), plain(tokens()).double(), torch.float32, 8 * 68, scale)
    model.unmerge_task()
    assert torch.equal(model(tokens(), task="t"), want)
    assert all(not isinstance(getattr(m, "_taps_name", None), str) for m in model.unload().modules())


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_closed_attention_that_was_loaded_keeps_its_bits(tmp_path, gradients: bool, gates: str) -> None:
    """Without a Delta it takes the products that it took with one."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.own(x, x, x, need_weights=False)[0]

    for seed in range(8):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(4, 4), Attention(), nn.Linear(4, 2))
        model = TaskModel(base, TapsConfig(lam=1.0), gates=gates).eval()
        model.add_task("t")
        fill(model, ("0",))
        model.save_task("t", tmp_path / "t.taps")
        model.load_task(tmp_path / "t.taps", "loaded")
        x = torch.randn(3, 16, 4)
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model(x, task="loaded"), model(x, task="t"))


def test_full_config_trains_the_joint_projection() -> None:
    _, model = encoder(FullConfig())
    model.train()
    model(tokens(), task="t").square().sum().backward()
    part = parts(model)["0.self_attn"]
    assert part.change.delta.grad.abs().max() > 0
    assert part.bias.grad.abs().max() > 0
