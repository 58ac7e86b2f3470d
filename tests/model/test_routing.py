"""Unusual readers and unusual layers: the task is in force, the base is unchanged, or an error names the layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

from taps_ext import BypassedLayerError, TapsConfig, TaskModel


class Product(torch.autograd.Function):
    """What extensions do with a weight: `apply` does not ask `__torch_function__`."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


READERS = {
    "stock": F.linear,
    "function": Product.apply,
    "reentrant": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    "recomputed": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "product": lambda x, w: x @ w.t(),
}


class Reads(nn.Module):
    def __init__(self, read) -> None:
        super().__init__()
        self.body, self.fc, self.read = nn.Linear(6, 6), nn.Linear(6, 2), read

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.read(x, self.body.weight) + self.body.bias)


def task_on(base: nn.Module, *, score: float = 0.15, **settings) -> TaskModel:
    model = TaskModel(base, TapsConfig(lam=0.5, **settings))
    torch.manual_seed(1)
    model.add_task("t", num_classes=3)
    with torch.no_grad():
        for _, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.3)
            part.gate.score.fill_(score)
    return model


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"stock"}))
@pytest.mark.parametrize("score", [0.15, 0.05])
def test_every_reader_trains_the_layer(reader: str, score: float) -> None:
    found = []
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    for name in ("stock", reader):
        torch.manual_seed(0)
        model = task_on(Reads(READERS[name]), score=score)
        model(x.clone().requires_grad_(), task="t").square().sum().backward()
        part = model.state("t").table["body"]
        found.append((part.gate.score.grad, part.change.delta.grad))
    (want_score, want_delta), (score_grad, delta_grad) = found
    assert want_score is not None and score_grad is not None
    # The same 30 products of float32 numbers of order one, summed in another order.
    torch.testing.assert_close(score_grad, want_score, rtol=1e-5, atol=1e-5)
    assert (delta_grad is None) == (want_delta is None)
    if want_delta is not None:
        torch.testing.assert_close(delta_grad, want_delta, rtol=1e-5, atol=1e-5)


def test_a_weight_read_without_gradients_can_be_used_with_them() -> None:
    class Early(Reads):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                weight = self.body.weight
            return self.fc(F.linear(x, weight))

    for score in (0.15, 0.05):
        model = task_on(Early(None), score=score).train()
        model(torch.randn(5, 6), task="t").square().sum().backward()
        assert model.state("t").table["body"].gate.score.grad is not None


@pytest.mark.parametrize(
    "spoil",
    [
        old_weight_norm,
        old_spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_reparametrised_layer_can_be_excluded(spoil) -> None:
    def make() -> nn.Module:  # not every such layer can be copied
        torch.manual_seed(0)
        return nn.Sequential(spoil(nn.Linear(6, 6)), nn.Linear(6, 6), nn.Linear(6, 2)).eval()

    plain, x = make(), torch.randn(5, 6)
    model = task_on(make(), exclude_modules=["0*"]).eval()
    assert torch.equal(model(x), plain(x))
    assert not torch.equal(model(x, task="t")[:, :2], plain(x))
    base = model.unload()
    assert torch.equal(base(x), plain(x)) and type(base[0]).__name__ == type(plain[0]).__name__


def test_a_base_that_cannot_be_copied_loses_nothing() -> None:
    class Unique(nn.Identity):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is one of me")

    model = task_on(nn.Sequential(Unique(), nn.Linear(6, 6), nn.Linear(6, 2))).eval()
    x = torch.randn(5, 6)
    want = model(x, task="t")
    with pytest.raises(RuntimeError, match="there is one of me"):
        model.merge_and_unload("t")
    assert torch.equal(model(x, task="t"), want)


class NoBias(nn.Linear):
    """Fused layers of some models delete what they do not use."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        del self.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, getattr(self, "bias", None))


class WeightBuffer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class Standardised(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(dim=(1, 2, 3), keepdim=True), bias)


@pytest.mark.parametrize("layer", [NoBias(), WeightBuffer()])
def test_layers_that_keep_their_tensors_elsewhere(layer) -> None:
    base = nn.Sequential(layer, nn.Linear(6, 2)).eval()
    plain, x = copy.deepcopy(base), torch.randn(5, 6)
    model = TaskModel(base, TapsConfig(lam=0.5, exclude_modules=["0"])).eval()
    model.add_task("t", num_classes=3)
    assert torch.equal(model(x), plain(x)) and model(x, task="t").shape == (5, 3)
    assert torch.equal(pickle.loads(pickle.dumps(model.state_dict()))["base.1.weight"], plain[1].weight)


def test_a_convolution_with_a_conv_forward_of_its_own() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Standardised(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    plain, x = copy.deepcopy(base), torch.randn(2, 3, 8, 8)
    model = task_on(base).eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        out = model(x, task="t")
        assert torch.equal(out, model.merge_and_unload("t")(x)) and not torch.equal(out[:, :2], plain(x))


@pytest.mark.parametrize("opened", ["layers.0.self_attn", "layers.1.self_attn", "layers.1.linear1", "layers.1*"])
def test_a_padded_encoder_is_its_merged_copy(opened: str) -> None:
    """TransformerEncoder looks at its first layer to decide whether all of them get nested tensors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.fc(self.encoder(x, src_key_padding_mask=padding))

    torch.manual_seed(0)
    base = Net().eval()
    plain = copy.deepcopy(base)
    model = task_on(base).eval()
    model.set_gates("t", open=[f"encoder.{opened}"])
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        assert torch.equal(model(x, padding, task=None), plain(x, padding))
        got = model(x, padding, task="t")
        assert torch.equal(got, model.merge_and_unload("t")(x, padding))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "ask", [lambda x, w: x.to(w), lambda x, w: x.to(w.dtype), lambda x, w: x + torch.zeros_like(w)]
)
def test_asking_is_not_using(ask, merged: bool) -> None:
    class Asks(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.linear(ask(x, self.body.weight), self.body._parameters["weight"]))

    model = task_on(Asks(None)).eval()
    if merged:
        model.merge_task("t")
    with pytest.raises(BypassedLayerError, match="body"):
        model(torch.randn(6, 6), task="t")


def test_a_norm_whose_dtype_alone_is_read_is_bypassed() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.to(self.norm.weight.dtype))

    with pytest.raises(BypassedLayerError, match="norm"):
        task_on(Asks())(torch.randn(5, 6), task="t")


def test_a_weight_tied_to_something_frozen_is_the_tasks_own_when_merged() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.decoder, self.fc = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.Linear(9, 2)
            self.decoder.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.decoder(self.embedding(x)))

    torch.manual_seed(0)
    model, x = task_on(Tied()).eval(), torch.arange(40) % 9  # more rows than are fused
    with torch.no_grad():
        want = model(x, task="t")
        assert torch.equal(model.merge_and_unload("t")(x), want)


def test_hooks_in_backward_read_the_base() -> None:
    """Gradients are off in hooks, on where checkpointing repeats a forward: only the latter needs to know the task."""
    model, seen = task_on(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))), []
    delta = model.state("t").table["0"].change.delta
    delta.register_post_accumulate_grad_hook(lambda _: seen.append(model.base[0].weight.norm()))
    delta.register_hook(lambda _: seen.append(model.base[0](torch.ones(1, 6)).sum()))
    model(torch.randn(5, 6), task="t").sum().backward()
    base = model.unload()
    assert torch.equal(seen[1], base[0].weight.norm()) and torch.equal(seen[0], base[0](torch.ones(1, 6)).sum())


@pytest.mark.parametrize("score", [0.15, 0.05])
def test_attention_compiles_whole(score: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    grads = []
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        torch.manual_seed(0)
        model = task_on(Net(), score=score)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(x, task="t").square().sum().backward()
        grads.append([part.gate.score.grad for _, part, _ in model.state("t").gated()])
    # Reductions of a few hundred float32 products in another order.
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_a_closed_attention_copies_no_weight(monkeypatch) -> None:
    import taps_ext.ops as ops

    made = []
    whole = ops.effective_weight
    monkeypatch.setattr(ops, "effective_weight", lambda *args, **kwargs: made.append(1) or whole(*args, **kwargs))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = attention, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    model = task_on(Net(), score=0.05).train()
    model(torch.randn(2, 5, 8), task="t").square().sum().backward()
    assert made == [] and all(part.gate.score.grad is not None for _, part, _ in model.state("t").gated())
