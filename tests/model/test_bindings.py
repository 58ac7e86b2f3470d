"""Bindings: what is settled for a task at a module is what that module, its part and their tensors are at the call."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from taps_ext import FullConfig, TapsConfig, TapsError, TaskModel
from taps_ext.nn import TapsConv2d, TapsLinear
from taps_ext.parts import Layer


def bound_model(config=None, closed: tuple[str, ...] = ()) -> TaskModel:
    """With one task "t", which has run with gradients and without."""
    model = TaskModel(settle(TinyNet()), config or TapsConfig(lam=1.0))
    model.add_task("t", num_classes=2)
    model.set_task("t")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, part, _ in model.state("t").gated():
            part.change.delta.normal_(0, 0.1)
            if name in closed:
                part.gate.score.fill_(0.0)
    both(model.eval())
    return model


def both(model: nn.Module, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = images() if x is None else x
    with torch.no_grad():
        without = model(x)
    return model(x).detach(), without


class Same(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 1.0


@pytest.mark.parametrize("closed", [(), ("hidden", "conv2")], ids=["open", "closed"])
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
def test_a_pruned_part(closed: tuple[str, ...], amp: bool) -> None:
    """Pruning takes a tensor from the parameters and makes it anew in a hook, for each forward."""
    model = bound_model(closed=closed)
    change = model.state("t").table["hidden"].change
    want = copy.deepcopy(model)
    prune.custom_from_mask(change, "delta", torch.ones_like(change.delta).triu())
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for factor in (1.0, 2.0):
            with torch.no_grad():
                change.delta_orig.mul_(factor)
                want.state("t").table["hidden"].change.delta.copy_(change.delta_orig.triu())
            for got, wants in zip(both(model), both(want), strict=True):
                assert torch.allclose(got, wants, atol=1e-6)
            model(images()).float().sum().backward()  # a graph of its own for each
    assert (change.delta_orig.grad is None) == bool(closed)


@pytest.mark.parametrize("name", ["bias", "weight"])
def test_a_pruned_tensor_of_a_tasks_own(name: str) -> None:
    model = bound_model(FullConfig())
    other = settle(TinyNet(2))
    with torch.no_grad():
        other.hidden.weight.mul_(1e-6)  # no Delta gives these exactly
        other.hidden.bias.add_(1.0)
    model.extract_task("own", other.state_dict())
    model.set_task("own")
    before = both(model)
    part = model.state("own").table["hidden"]
    assert part.change.weight is not None
    holder = part if name == "bias" else part.change
    prune.custom_from_mask(holder, name, torch.ones_like(getattr(holder, name)))
    assert all(torch.equal(a, b) for a, b in zip(both(model), before, strict=True))


@pytest.mark.parametrize("closed", [(), ("hidden",)], ids=["open", "closed"])
def test_a_parametrised_score(closed: tuple[str, ...]) -> None:
    model = bound_model(closed=closed)
    before = both(model)
    gate = model.state("t").table["hidden"].gate
    parametrize.register_parametrization(gate, "score", Same())
    assert all(torch.equal(a, b) for a, b in zip(both(model), before, strict=True))
    model(images()).sum().backward()
    assert gate.parametrizations.score.original.grad.item() != 0.0


@pytest.mark.parametrize("name", ["bias", "delta", "score"])
@pytest.mark.parametrize("score", [0.5, 0.0])
def test_a_layer_without_a_model_is_parametrised(name: str, score: float) -> None:
    torch.manual_seed(0)
    layer, x = TapsLinear(3, 4), torch.randn(2, 3)
    with torch.no_grad():
        layer.delta.normal_()
        layer.score.fill_(score)
    before = both(layer, x)
    holder = {"bias": layer, "delta": layer.part.change, "score": layer.part.gate}[name]
    parametrize.register_parametrization(holder, name, Same())
    assert all(torch.equal(a, b) for a, b in zip(both(layer, x), before, strict=True))


@pytest.mark.parametrize("closed", [(), ("conv2",)], ids=["open", "closed"])
@pytest.mark.parametrize(
    ("name", "value", "pair"),
    [("stride", (1,), (1, 1)), ("padding", [0], (0, 0)), ("dilation", 2, (2, 2)), ("stride", [2, 1], (2, 1))],
)
def test_settings_as_torch_takes_them(closed: tuple[str, ...], name: str, value: object, pair: tuple) -> None:
    """One number may stand for both axes, in a container or not."""
    model = bound_model(closed=closed)
    want = copy.deepcopy(model)
    setattr(model.base.conv2, name, value)
    setattr(want.base.conv2, name, pair)
    assert all(torch.equal(a, b) for a, b in zip(both(model), both(want), strict=True))
    gradients = []
    for made in (model, want):
        torch.manual_seed(1)
        made(images()).sum().backward()
        gradients.append([p.grad for p in made.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("score", [0.5, 0.0])
def test_a_layer_that_ran_dies_with_its_last_reference(score: float) -> None:
    """Without the cycle collector, which knows nothing of a GPU's memory."""
    gc.disable()
    try:
        for layer, x in ((TapsLinear(3, 4), torch.randn(2, 3)), (TapsConv2d(3, 4, 3), torch.randn(2, 3, 5, 5))):
            layer.score.data.fill_(score)
            both(layer, x)
        known = weakref.ref(layer), weakref.ref(layer.delta)
        del layer
        assert [each() for each in known] == [None, None]
        model = bound_model()
        state = model.state("t")
        known = weakref.ref(model), weakref.ref(state), weakref.ref(model.base), weakref.ref(model.base.hidden)
        output = model(images())
        del model, state
        assert [each() for each in known] == [None, None, None, None] and output.requires_grad
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["conv2", "bn1", "hidden"])
def test_a_copy_in_the_place_of_a_module_is_refused(name: str) -> None:
    """It asks for its task as the module did, whose settings and tensors the task was bound to."""
    model = bound_model()
    own = model.base.get_submodule(name)
    setattr(model.base, name, copy.deepcopy(own))
    for run in (model, torch.no_grad()(model)):
        with pytest.raises(TapsError, match=f"{name}: another module has taken its place"):
            run(images())
    setattr(model.base, name, nn.Sequential(own))  # around it: as before
    both(model)
    setattr(model.base, name, own)
    both(copy.deepcopy(model))  # a copy of all binds its own


def test_a_binding_made_while_another_thread_makes_one_is_not_kept(monkeypatch) -> None:
    """The other thread's forward has seen a later score; here it runs where the binding is made."""
    torch.manual_seed(0)
    layer, x = TapsLinear(3, 4), torch.randn(2, 3)
    with torch.no_grad():
        layer.delta.normal_()
    original, ran = Layer.bind, []

    def interrupted(part: Layer, host: TapsLinear, *, stock: bool):
        made = original(part, host, stock=stock)
        if not ran:
            ran.append(True)
            host.score.data.zero_()
            host(x)
        return made

    monkeypatch.setattr(Layer, "bind", interrupted)
    layer(x)
    assert ran and torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_layer_without_a_model_is_bound_to_its_gate_as_it_is() -> None:
    """Moved, where the score is read on its device again, or fixed after it ran with the host's."""
    layer, x = TapsLinear(3, 4), torch.ones(2, 3)
    both(layer, x)
    before = layer._bound
    layer.to("meta")(x.to("meta"))
    assert layer.gate is None and layer._bound is not before
    layer = TapsLinear(3, 4)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.delta.fill_(2.0)
    for is_open, factor in ((False, 1.0), (True, 3.0)):
        fixed = copy.deepcopy(layer)
        fixed.score.data.fill_(0.0 if is_open else 0.5)
        both(fixed, x)
        fixed.part.fix(is_open)
        want = F.linear(x, torch.full((4, 3), factor), layer.bias)
        assert fixed.gate is is_open and all(torch.allclose(got, want, atol=1e-6) for got in both(fixed, x))


@pytest.mark.parametrize("closed", [(), ("hidden", "conv1")], ids=["open", "closed"])
@pytest.mark.parametrize("mode", [True, False], ids=["gradients", "inference"])
def test_mistakes_are_told_alike(closed: tuple[str, ...], mode: bool) -> None:
    """By layers that are open and closed, with gradients and without."""
    model = bound_model(closed=closed)
    with torch.set_grad_enabled(mode):
        with pytest.raises(TypeError, match="input: expected dtype torch.float32 like weight"):
            model(images().double())
        with pytest.raises(TypeError, match="input: expected a tensor, got list"):
            model([1.0, 2.0])
        before = model(images().fill_(1.0))
        model.base.hidden.bias.data = model.base.hidden.bias.data.double()
        assert torch.equal(model(images().fill_(1.0)), before)
