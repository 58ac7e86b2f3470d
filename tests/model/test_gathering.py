"""Forwards with gradients that make the weights of all layers at once, as on a GPU: equal gradients, few launches."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from checkpointed import plain_and_checkpointed, same
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from taps_ext import FullConfig, TapsConfig, TapsError, TaskModel, ops
from taps_ext.model import gathering
from taps_ext.parts import token


class Operators(TorchDispatchMode):
    """Our operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "taps_ext":
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def adapted(base: nn.Module, config=None, *, gates: str = "host", closed: tuple[int, ...] = ()) -> TaskModel:
    model = TaskModel(base, TapsConfig(lam=0.5) if config is None else config, gates=gates)
    model.add_task("t", num_classes=4)
    model.set_task("t")
    with torch.no_grad():
        for index, (_, part, gate) in enumerate(model.state("t").gated()):
            part.change.delta.normal_(0, 0.05)
            if gate.score is not None:
                gate.score.fill_(0.05 if index in closed else 0.15)
    return model.train()


def step(
    model: TaskModel, x: Tensor, forced: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    gathering.forced = forced
    try:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = model(x)
        output.float().square().sum().backward()
    finally:
        gathering.forced = None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return output, found


@pytest.fixture(autouse=True)
def _left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "forced", None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("config", [None, FullConfig()], ids=["taps", "full"])
def test_open_layers_to_the_bit(dtype, gates: str, config) -> None:
    model, x = adapted(settle(TinyNet()), config, gates=gates), images(4)
    for name, parameter in model.named_parameters():  # of a convolution's bias torch sums the gradient in its own order
        parameter.requires_grad_(parameter.requires_grad and not name.endswith("conv2.bias"))
    apart, together = step(model, x, False, dtype), step(model, x, True, dtype)
    assert torch.equal(apart[0], together[0]) and same(together[1], apart[1])


@pytest.mark.parametrize("gates", ["host", "device"])
def test_closed_layers(gates: str) -> None:
    """Deltas to the bit (none, or zeros where the device alone knows); scores as another sum of the same products."""
    model, x = adapted(settle(TinyNet()), gates=gates, closed=(0, 2)), images(4).double()
    model.double()
    for _, part, gate in model.state("t").gated():  # float32 by themselves, whose rounding is not the point
        for module in (part.change, gate):
            for name, parameter in module.named_parameters():
                module._parameters[name] = nn.Parameter(parameter.detach().double())
    model.refresh_gates()
    (first, apart), (second, together) = step(model, x, False), step(model, x, True)
    assert torch.equal(first, second) and together.keys() == apart.keys()
    for name, gradient in together.items():
        if name.endswith("score"):
            torch.testing.assert_close(gradient, apart[name], rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(gradient, apart[name]), name


def test_launches_do_not_grow() -> None:
    for layers in (1, 9):
        base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)), nn.Linear(6, 3))
        model, x = adapted(base), torch.randn(5, 6)
        step(model, x, True)
        with Operators() as operators:
            step(model, x, True)
        assert operators.found == {"foreach_reconstruct": 1, "foreach_settle": 1}


def test_every_weight_goes_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph alone holds them once the forward is over, and lets go of each as its layer's backward has run."""
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3))
    model, x = adapted(base), torch.randn(5, 6, requires_grad=True)
    made: list[weakref.ref[Tensor]] = []
    whole = ops.foreach_effective_weight

    def watched(layers):
        found = whole(layers)
        made.extend(weakref.ref(weight) for weight in found)
        return found

    def living() -> list[bool]:
        gc.collect()
        return [ref() is not None for ref in made]

    seen: list[list[bool]] = []
    inner = []
    for layer in base:
        layer.register_forward_hook(lambda module, args, output: inner.append(output))
    monkeypatch.setattr(ops, "foreach_effective_weight", watched)
    gathering.forced = True
    output = model(x)
    for value in inner[:3]:  # their gradients are there before the layer's own backward runs
        value.register_hook(lambda gradient: seen.append(living()))
    inner.clear()
    seen.append(living())
    output.sum().backward()
    seen.append(living())
    assert seen == [[True] * 3, [True] * 3, [True, True, False], [True, False, False], [False] * 3]


def test_without_gradients_nothing_is_kept() -> None:
    model, x = adapted(settle(TinyNet())), images(4)
    gathering.forced = True
    with torch.no_grad(), Operators() as operators:
        model(x)
    assert "foreach_reconstruct" not in operators.found
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with Operators() as operators:
        model(x.requires_grad_())
    assert "foreach_reconstruct" not in operators.found  # nothing is learned


def test_samples_and_half_precision_leave_closed_layers_to_themselves() -> None:
    model, x = adapted(settle(TinyNet()), TapsConfig(lam=0.5, gate_fraction=0.5), closed=(0, 1)), images(4)
    gathering.forced = True
    state = model.state("t")
    model(x)
    open_layers = [name for name, _, gate in state.gated() if gate.known]
    bindings = state.catch_up().gathering
    assert list(gathering.together(bindings, sampled=True)) == open_layers
    assert len(gathering.together(bindings, sampled=False)) == len(bindings)
    with torch.autocast("cpu", dtype=torch.float16):
        assert list(gathering.together(bindings, sampled=False)) == open_layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """Blocks that run again in backward, also where they turned gradients on by themselves."""
    plain, checkpointed = plain_and_checkpointed(reentrant)
    x = images(6)
    gathering.forced = True
    found = []
    for model in (plain, checkpointed):
        loss = sum(
            scale * model(x.requires_grad_(), task=name)["logits"].square().sum()
            for name, scale in (("a", 1.0), ("b", 2.0))
        )
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert same(found[1], found[0]) and any(name.endswith("delta") for name in found[0])


def test_a_weight_that_was_written_to_since() -> None:
    """Autograd says so, as it does of any tensor that backward reads."""
    model, x = adapted(settle(TinyNet())), images(4)
    gathering.forced = True
    loss = model(x).square().sum()
    with torch.no_grad():
        next(iter(model.state("t").gated()))[1].change.delta.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_in_another_ones_place() -> None:
    model, x = adapted(settle(TinyNet())), images(4)
    gathering.forced = True
    model(x)
    model.base.conv2 = copy.deepcopy(model.base.conv2)
    with pytest.raises(TapsError, match="another module has taken its place"):
        model(x)


def test_mistakes_are_told_as_by_a_layer_alone() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    gathering.forced = True
    with pytest.raises(RuntimeError, match=r"input: expected shape \[\.\.\., 6\]"):
        model(torch.randn(5, 7))
    with pytest.raises(TypeError, match="input: expected dtype torch.float32 like weight"):
        model(torch.randn(5, 6).double())


def test_second_derivatives_are_refused() -> None:
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    gathering.forced = True
    deltas = [part.change.delta for _, part, _ in model.state("t").gated()]
    (first,) = torch.autograd.grad(model(x).pow(3).sum(), deltas[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


def test_nan_in_a_closed_delta_raises() -> None:
    model, x = adapted(settle(TinyNet()), closed=(0,)), images(4)
    gathering.forced = True
    with torch.no_grad():
        next(iter(model.state("t").gated()))[1].change.delta.view(-1)[0] = float("nan")
    with pytest.raises((RuntimeError, ValueError), match="delta: expected finite values in a closed layer"):
        model(x).square().sum().backward()


def test_transforms_and_graphs_go_the_usual_way() -> None:
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    gathering.forced = True
    values = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(values)
    model.zero_grad()
    loss(values).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_other_parameters_than_the_models_own() -> None:
    """`functional_call` swaps parameters: the weights that are made are made of those."""
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    other = {name: (p + 0.1).detach().requires_grad_() for name, p in model.named_parameters() if "delta" in name}
    gathering.forced = False
    want = torch.func.functional_call(model, other, (x,))
    gathering.forced = True
    got = torch.func.functional_call(model, other, (x,))
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(value.grad is not None for value in other.values())


class Mixed(nn.Module):
    """Autocast of its own, and a checkpointed layer in it, or an island without."""

    def __init__(self, dtype: torch.dtype | None, checkpointed: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.fc = nn.Linear(16, 4)
        self.dtype, self.checkpointed = dtype, checkpointed

    def inner(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return torch.relu(self.c(torch.relu(self.b(x if self.dtype else x.float()))))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)
        return self.fc(x.float())


@pytest.mark.parametrize("outer", [None, torch.bfloat16])
@pytest.mark.parametrize("inner", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("closed", [(), (1,)], ids=["open", "closed"])
def test_a_region_with_autocast_of_its_own(outer, inner, closed) -> None:
    """A W_t in another type than a layer's product is not that layer's; what is recomputed is what was."""
    x = torch.randn(5, 16)
    found = []
    for checkpointed, forced in ((False, False), (False, True), (True, True)):
        torch.manual_seed(3)
        model = adapted(Mixed(inner, checkpointed), closed=closed)
        found.append(step(model, x, forced, outer))
    (want, grads), (got, others), (again, last) = found
    assert torch.equal(got, want) and torch.equal(again, want)
    assert same(last, others)
    for name, gradient in grads.items():  # of a closed score the sum has another order, in the product's type
        loose = closed and name.endswith("score") and ".b." in name.replace("/", ".")
        rounding = {"rtol": 3e-2, "atol": 3e-2 * gradient.abs().max().item()} if loose else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(others[name], gradient, msg=name, **rounding)


def test_a_weight_that_comes_with_a_hook() -> None:
    """As where weights are loaded layer by layer: such a layer makes its own."""
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    want = step(model, x, False)
    layer = model.base[0]
    weight = layer._parameters["weight"]

    def bring(module: nn.Module, args: object) -> None:
        module._parameters["weight"] = weight

    def take(module: nn.Module, args: object, output: object) -> None:
        module._parameters["weight"] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)

    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(take)
    take(layer, None, None)
    got = step(model, x, True)
    assert torch.equal(got[0], want[0]) and same(got[1], want[1])
    assert list(gathering.together(model.state("t").catch_up().gathering, sampled=False)) == []


def test_parts_with_a_forward_of_their_own() -> None:
    """Hooks on a part, and changes that are more than W + Delta, are not passed over."""
    for gates in ("host", "device"):
        model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), gates=gates), torch.randn(5, 6)
        (_, part, _), *_ = model.state("t").gated()
        plain = step(model, x, True)[0]
        part.register_forward_hook(lambda module, args, output: output * 2)
        token.note()  # bindings are made anew
        want, got = step(model, x, False)[0], step(model, x, True)[0]
        assert torch.equal(got, want) and torch.equal(got, plain) == (gates == "host")  # whose binding asks no part

    class Doubled(type(part.change)):
        def run(self, op, input, weight, gate, bias, sample=None):
            return op.stock(input, weight + 2 * self.delta, bias, *op.geometry)

        def bind(self, host, gate, bias_of, general):
            return None

    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    (_, part, _), *_ = model.state("t").gated()
    plain = step(model, x, True)[0]
    part.change.__class__ = Doubled
    token.note()
    want, got = step(model, x, False)[0], step(model, x, True)[0]
    assert torch.equal(got, want) and not torch.equal(got, plain)


def test_gradients_in_batches() -> None:
    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), closed=(0,)), torch.randn(5, 6)
    parameters = [p for _, part, gate in model.state("t").gated() for p in (part.change.delta, gate.score)]
    found = []
    for forced in (False, True):
        gathering.forced = forced
        output = model(x).sum(0)
        stacked = torch.eye(len(output))
        if forced:
            found.append(torch.autograd.grad(output, parameters, stacked, is_grads_batched=True, allow_unused=True))
        else:
            rows = [torch.autograd.grad(output, parameters, r, retain_graph=True, allow_unused=True) for r in stacked]
            found.append([None if one[0] is None else torch.stack(one) for one in zip(*rows, strict=True)])
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


class Keeper(nn.Module):
    """Reads a weight once and keeps what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(self.a.weight)
        return self.fc(nn.functional.linear(x, self.kept[0], self.a.bias))


def test_a_weight_that_was_read_follows_its_delta() -> None:
    model, x = adapted(Keeper()), torch.randn(5, 6)
    step(model, x, True)
    with torch.no_grad():
        next(iter(model.state("t").gated()))[1].change.delta.add_(1.0)
        gathering.forced = True
        got = model(x)
        model.base.kept.clear()
        gathering.forced = False
        assert torch.equal(model(x), got)


def test_memory_that_runs_out_is_told() -> None:
    class Full(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is nn.functional.linear:
                raise torch.OutOfMemoryError("no memory")
            return func(*args, **(kwargs or {}))

    model, x = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))), torch.randn(5, 6)
    gathering.forced = True
    with Full(), pytest.raises(torch.OutOfMemoryError):
        model(x)
