"""The laws of the design, each on a whole model."""

from __future__ import annotations

import copy
import hashlib
import threading

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import nn

from taps_ext import FullConfig, ProbeConfig, TapsConfig, TaskModel, ops
from taps_ext.nn import TapsConv2d, TapsLinear

LAYERS = ["conv1", "conv2", "depthwise", "hidden"]


def build(dtype=torch.float32, gates="host", **settings):
    torch.manual_seed(0)
    base = settle(TinyNet()).to(dtype)
    model = TaskModel(base, TapsConfig(lam=1.0, **settings), gates=gates)
    model.add_task("t", num_classes=5)
    model.set_task("t")
    return base, model.eval()


def weight_gradients(model, x, target, layer):
    """Float64 oracle: dL/dW_t of one layer, by the plain base with W_t as an ordinary parameter."""
    plain = copy.deepcopy(model).unload()
    plain.fc = copy.deepcopy(model.state("t").head)
    state = model.state("t")
    for name, part in state.table.items():
        if name in ("bn1", "gn", "ln"):
            plain.get_submodule(name).load_state_dict(part.state_dict())
    with torch.no_grad():
        for name, part, _ in state.gated():
            if part.gate.known:
                plain.get_submodule(name).weight += part.change.delta
    weight = plain.get_submodule(layer).weight.requires_grad_()
    loss = F.cross_entropy(plain.eval()(x), target)
    return torch.autograd.grad(loss, weight)[0], loss


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("is_open", [True, False])
def test_every_layer_counts(layer, is_open) -> None:
    """A random Delta in one layer changes the output, and its gradients are those of the float64 oracle."""
    _, model = build(torch.float64)
    x, target = images(4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    part = model.state("t").table[layer]
    before = model(x).detach()
    with torch.no_grad():
        part.change.delta.normal_(0, 0.1)
        part.gate.score.fill_(0.15 if is_open else 0.05)
    model.eval()
    output = model(x)
    assert torch.equal(output, before) is not is_open
    loss = F.cross_entropy(output, target)
    loss.backward()
    want, reference_loss = weight_gradients(model, x, target, layer)
    assert loss.item() == pytest.approx(reference_loss.item(), rel=1e-12)
    eps = torch.finfo(torch.float32).eps  # Delta, and so its gradient, is float32 over a float64 base
    if is_open:
        assert torch.allclose(part.change.delta.grad.double(), want, rtol=eps, atol=1e-12)
    else:
        assert part.change.delta.grad is None
    assert part.gate.score.grad.item() == pytest.approx((want * part.change.delta).sum().item(), rel=4 * eps)


def test_all_closed_is_the_base_bit_for_bit_even_with_nan() -> None:
    _, model = build(norm="frozen")
    x = images()
    with torch.no_grad():
        want = model(x, task=None)
        for _, part, _ in model.state("t").gated():
            part.change.delta.fill_(float("nan"))
            part.gate.score.fill_(0.05)
        model.add_task("copy")  # a copy of the base's own head
        model.state("t").table["fc"].module = model.state("copy").head
        assert torch.equal(model(x), want)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), model.unload()(x))


def test_a_nonfinite_closed_delta_raises_when_training() -> None:
    from taps_ext import GateError

    _, model = build()
    part = model.state("t").table["conv2"]
    with torch.no_grad():
        part.change.delta[0, 0] = float("inf")
        part.gate.score.fill_(0.0)
    model.train()
    with pytest.raises(GateError, match="conv2: delta: expected finite"):
        model(images())


@pytest.mark.parametrize("assign", [False, True])
def test_a_nonfinite_closed_delta_that_is_loaded_raises_when_training(assign: bool) -> None:
    """Before anything is computed from it, on a GPU too, whose backward does not look at it."""
    from taps_ext import GateError

    _, model = build()
    state = model.state("t")
    with torch.no_grad():
        state.table["conv2"].gate.score.fill_(0.0)
    model.train()
    model(images()).sum().backward()  # found good
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter is state.table["conv2"].change.delta:
            loaded[name].fill_(float("inf"))
    model.load_state_dict(loaded, assign=assign)
    with pytest.raises(GateError, match="conv2: delta: expected finite"):
        model(images())


def test_a_nan_score_raises() -> None:
    from taps_ext import GateError

    _, model = build()
    with torch.no_grad():
        model.state("t").table["hidden"].gate.score.fill_(float("nan"))
    with pytest.raises(GateError, match="hidden: score"):
        model(images())


# ---------------------------------------------------------------------------------------------- law 2


class Wide(nn.Module):
    """Weights far larger than any activation: 144 KiB to 1 MiB against at most 18 KiB (im2col columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.lin1 = nn.Linear(64, 1024)
        self.lin2 = nn.Linear(1024, 256)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = F.relu(self.conv(x)).mean(dim=(2, 3))
        return self.fc(F.relu(self.lin2(F.relu(self.lin1(x)))))


def weight_sized_allocations(run, smallest: int) -> list[int]:
    """Sizes of all allocations of at least `smallest` bytes during `run`, but for what aten's own operators need.

    oneDNN packs the weights of every convolution, the stock layer's too, into a layout of its own, and takes scratch
    memory for products in bfloat16 where the CPU has them. So what is allocated inside aten's convolutions does not
    count, nor what is allocated and freed again inside one of its matrix products.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()

    def spans(*names: str) -> list[tuple[int, int]]:
        return [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in names]

    convolutions, products = spans("aten::mkldnn_convolution", "aten::convolution_backward"), spans("aten::mm")
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and abs(e.nbytes()) >= smallest]

    def own(at: int, size: int) -> bool:
        if any(begin <= at <= end for begin, end in convolutions):
            return False
        ends = [end for begin, end in products if begin <= at <= end]
        return not any(at <= when <= end and freed == -size for end in ends for when, freed in memory)

    return [size for at, size in memory if size > 0 and own(at, size)]


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the reference allocates W_t")
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("closed", [(), ("lin1",), ("conv", "lin1", "lin2")], ids=["open", "mixed", "closed"])
def test_no_weight_sized_allocation(amp, closed) -> None:
    """Over 20 steps and 20 inferences the only weight-sized tensors are the open Deltas' own gradients.

    In float32 aten's convolution_backward makes an open convolution's gradient itself, so that it is not listed;
    under autocast it makes a bfloat16 one there, and the float32 gradient is listed.
    """
    torch.manual_seed(0)
    base = Wide().eval()
    model = TaskModel(base, TapsConfig(lam=1.0))
    model.add_task("t", num_classes=10)
    model.set_task("t")
    parts = {name: part for name, part, _ in model.state("t").gated()}
    with torch.no_grad():
        for name in closed:
            parts[name].gate.score.fill_(0.01)
    for part in parts.values():  # the scores keep their side of the threshold during the count
        part.gate.score.register_hook(torch.zeros_like)
    optimizer = torch.optim.SGD(model.parameter_groups(lr=1e-3), momentum=0.9)
    x, y = torch.randn(2, 64, 2, 2), torch.randint(0, 10, (2,))
    smallest = base.conv.weight.nbytes // 2 if amp else base.conv.weight.nbytes

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()

    def infer() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            model(x)

    model.train()
    step()
    step()
    sizes = weight_sized_allocations(lambda: [step() for _ in range(20)], smallest)
    wanted = [parts[name].change.delta.nbytes for name in parts if name not in closed and (amp or name != "conv")]
    assert sorted(sizes) == sorted(wanted * 20)
    model.eval()
    infer()
    assert weight_sized_allocations(lambda: [infer() for _ in range(20)], smallest) == []


# --------------------------------------------------------------------------------------- laws 5 and 11


def digest(module: nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize("config", [TapsConfig(lam=1.0), FullConfig(), ProbeConfig()], ids=lambda c: c.method)
def test_the_base_never_changes(config) -> None:
    torch.manual_seed(0)
    base = settle(TinyNet(dropout=0.3))
    base.conv1.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    before, keys, kinds = digest(base), list(base.state_dict()), [type(m) for m in base.modules()]
    text = repr(base)
    x = images()
    want = base(x)
    model = TaskModel(base, config)
    model.add_task("t", num_classes=5)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.1))
    for _ in range(10):
        model.train()
        optimizer.zero_grad()
        (model(x, task="t").square().mean() + model.sparsity_loss("t")).backward()
        optimizer.step()
    assert list(model.base.state_dict()) == keys
    assert torch.equal(model(x, task=None), want)
    model.eval()
    model.merge_task("t")
    model(x, task="t")
    model.unmerge_task()
    out = model.unload()
    assert out is base and digest(base) == before and [type(m) for m in base.modules()] == kinds
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags
    assert repr(base) == text and not any(k.startswith("_taps") for m in base.modules() for k in m.__dict__)
    assert torch.equal(base.eval()(x), want)


@pytest.mark.parametrize("gates", ["host", "device"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_closed_delta_rests(optimizer, gates) -> None:
    """50 closed steps leave Delta and its optimizer state alone; reopening resumes with the old state."""
    _, model = build(gates=gates)
    parts = {name: part for name, part, _ in model.state("t").gated()}
    part = parts["conv2"]
    groups = model.parameter_groups(lr=0.01, weight_decay=0.1)
    make = {"sgd": lambda g: torch.optim.SGD(g, momentum=0.9), "adamw": torch.optim.AdamW}[optimizer]
    optim = make(groups)
    for p in parts.values():
        p.gate.score.register_hook(torch.zeros_like)
    x = images()
    target = torch.tensor([0, 1, 2])

    def step() -> None:
        model.train()
        optim.zero_grad()
        F.cross_entropy(model(x), target).backward()
        model.drop_closed_gradients()
        optim.step()

    for _ in range(3):
        step()
    with torch.no_grad():
        part.gate.score.fill_(0.05)
    delta = part.change.delta.detach().clone()
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optim.state[part.change.delta].items()}
    other = parts["hidden"].change.delta.detach().clone()
    for _ in range(50):
        step()
    assert torch.equal(part.change.delta, delta) and part.change.delta.grad is None
    for key, value in optim.state[part.change.delta].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])), key
    assert not torch.equal(parts["hidden"].change.delta, other)
    with torch.no_grad():
        part.gate.score.fill_(0.15)
    step()
    assert not torch.equal(part.change.delta, delta)


# -------------------------------------------------------------------------------------------- law 12


def test_tasks_do_not_meet_across_threads() -> None:
    torch.manual_seed(0)
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=1.0)).eval()
    names = ["a", "b", None, "c"]
    for name in names:
        if name is not None:
            model.add_task(name, num_classes=4)
            with torch.no_grad():
                for _, part, _ in model.state(name).gated():
                    part.change.delta.normal_(0, 0.3)
    x = images()
    with torch.no_grad():
        want = {name: model(x, task=name) for name in names}
    wrong = []

    def work(name) -> None:
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(model(x, task=name), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------------------------- standalone layers


def test_standalone_layers_match_the_stock_layer() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 7), nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
    for stock, layer, x in [
        (linear, TapsLinear.from_linear(linear), torch.randn(4, 5)),
        (conv, TapsConv2d.from_conv2d(conv), torch.randn(2, 3, 6, 6)),
    ]:
        assert isinstance(layer, type(stock)) and layer.weight is stock.weight
        assert layer.refresh_gate() is True
        assert torch.equal(layer(x), stock(x))  # Delta = 0
        with torch.no_grad():
            layer.score.fill_(0.0)
        assert layer.refresh_gate() is False
        assert torch.equal(layer(x), stock(x))
        layer.part.gate.known = None
        assert torch.equal(layer(x), stock(x))
        layer(x).sum().backward()
        assert layer.weight.grad is None and layer.score.grad is not None
        assert layer.delta.grad is None  # it rests: on a CPU the host follows the score


def test_scores_and_deltas_stay_float32() -> None:
    _, model = build()
    value = model.state("t").table["conv1"].gate.score.item()
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        for _, part, _ in model.state("t").gated():
            assert part.gate.score.dtype == part.change.delta.dtype == torch.float32
        assert model.state("t").table["conv1"].gate.score.item() == value
        assert model.base.conv1.weight.dtype == cast
        model(images(dtype=cast))
    layer = TapsLinear(3, 3).half()
    assert layer.score.dtype == torch.float32 and layer.weight.dtype == torch.float16
