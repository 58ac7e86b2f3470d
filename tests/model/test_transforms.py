"""What torch does to whole models: functional_call, torch.func, compile, export, ONNX, DataParallel, quantisation."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import images, settle
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp

from taps_ext import TapsConfig, TapsError, TaskModel, UnsupportedModuleError, ops
from taps_ext.zoo import small_resnet


def adapted(gates: str = "host") -> TaskModel:
    torch.manual_seed(0)
    model = TaskModel(settle(small_resnet(5, 3, widths=(4, 8), blocks=1)), TapsConfig(lam=0.5), gates=gates).eval()
    model.add_task("a", num_classes=3)
    with torch.no_grad():
        for index, (_, part, _) in enumerate(model.state("a").gated()):
            part.change.delta.normal_(0, 0.1)
            part.gate.score.fill_(0.05 if index % 3 == 1 else 0.15)
    return model


def test_functional_call_uses_the_tensors_it_is_given() -> None:
    model, x = adapted(), images()
    own = dict(model.named_parameters())
    deltas = [name for name in own if name.endswith("delta")]
    scores = [name for name in own if name.endswith("score")]
    before = model(x, task="a")
    given = {name: own[name].detach() * 2 for name in deltas} | {name: own[name].detach() - 1 for name in scores[:2]}
    got = torch.func.functional_call(model, given, (x,), {"task": "a"})
    assert torch.equal(model(x, task="a"), before) and not torch.equal(got, before)
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)
    assert torch.equal(model(x, task="a"), got)


@pytest.mark.parametrize("gates", ["host", "device"])
def test_torch_func_grad_is_backward(gates: str) -> None:
    model, x = adapted(gates), images()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,), {"task": "a"}).square().sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    model(x, task="a").square().sum().backward()
    model.drop_closed_gradients("a")
    for name, parameter in trained.items():
        want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name.endswith("score"):
            # <G, Delta>: the same products summed in another order, a few hundred terms of size 1e-2 at most
            torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(got[name], want), name


def straight_through(w: Tensor, d: Tensor, s: Tensor) -> Tensor:
    """W_t with the derivatives of TAPS, written down once more: the gate's value, the score's derivative."""
    return w + (s >= 0.1) * d + (s - s.detach()) * d


def squared(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([t.square().sum() for t in tensors]).sum()


def ones(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.ones_like(t) for t in values)


def backward_of_grad(f: Callable[..., Tensor], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(t.clone().requires_grad_() for t in values)
    return torch.autograd.grad(squared(grad(f)(leaves)), leaves)


ORDERS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, v: grad(f)(v),
    "grad of grad": lambda f, v: grad(lambda u: squared(grad(f)(u)))(v),
    "jvp": lambda f, v: jvp(f, (v,), (ones(v),))[1],
    "jvp of grad": lambda f, v: jvp(grad(f), (v,), (ones(v),))[1],
    "backward of grad": backward_of_grad,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("score", [0.15, 0.05])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "read"])
def test_derivatives_of_every_order(order: str, score: float, known: bool, kind: str) -> None:
    """Input, Delta and score, in float64, against the formula in plain torch."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    shape = (4, 3, 3, 3) if kind == "conv2d" else (4, 3)
    w, d, s = torch.randn(shape, **options), torch.randn(shape, **options), torch.tensor(score, **options)
    x = torch.randn(2, 3, 5, 5, **options) if kind == "conv2d" else torch.randn(2, 3, **options)
    gate = score >= 0.1 if known else None
    apply = F.conv2d if kind == "conv2d" else F.linear

    def ours(values: tuple[Tensor, ...]) -> Tensor:
        x, d, s = values
        if kind == "read":
            out = x @ ops.effective_weight(w, d, s, gate=gate).t()
        else:
            out = getattr(ops, f"gated_{kind}")(x, w, d, s, gate=gate)
        return out.pow(3).sum()

    def plain(values: tuple[Tensor, ...]) -> Tensor:
        return apply(values[0], straight_through(w, *values[1:])).pow(3).sum()

    got, want = (ORDERS[order](f, (x, d, s)) for f in (ours, plain))
    # the same operations in float64 but for the order of sums
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", [True, False, None])
def test_forward_mode(gate: bool | None) -> None:
    w, d, s, x = torch.randn(3, 4), torch.randn(3, 4), torch.tensor(0.15), torch.randn(2, 4)
    used = w if gate is False else w + d
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(ops.gated_linear(dual, w, d, s, gate=gate)).tangent
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), used))


def test_hessian_vector_products_through_a_model() -> None:
    model, x = adapted(), images()
    plain = copy.deepcopy(model).merge_and_unload("a")
    name = "_states./a.parts./stem.change.delta"
    delta = dict(model.named_parameters())[name].detach()
    weight = model.base.stem.weight.detach()

    def through(d: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: d}, (x,), {"task": "a"}).square().sum()

    def merged(d: Tensor) -> Tensor:
        return torch.func.functional_call(plain, {"stem.weight": weight + d}, (x,)).square().sum()

    v = torch.randn_like(delta)
    got, want = (jvp(grad(f), (delta,), (v,))[1] for f in (through, merged))
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients() -> None:
    """vmap over grad: the mean of the samples' gradients is the gradient of the mean."""
    model, x = adapted(), images(4)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample[None],), {"task": "a"}).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    (model(x, task="a").square().sum() / len(x)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Sums over the same products in another order, a few hundred terms each.
            torch.testing.assert_close(each[name].mean(dim=0), parameter.grad, rtol=1e-4, atol=1e-5)


def test_module_compile() -> None:
    model, x = adapted(), images()
    want = model(x, task="a")
    model.compile(backend="aot_eager")
    assert torch.equal(model(x, task="a"), want)


def test_the_merged_model_exports() -> None:
    x = images()
    model = adapted()
    with torch.no_grad():
        want = model(x, task="a")
    plain = model.merge_and_unload("a")
    program = torch.export.export(plain, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(x), want)


def test_the_merged_model_runs_from_onnx(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    x = images()
    plain = adapted().merge_and_unload("a")
    torch.onnx.export(plain, (x,), str(tmp_path / "a.onnx"), dynamo=True, verbose=False)
    stored = onnx.load(str(tmp_path / "a.onnx"))
    (got,) = ReferenceEvaluator(stored).run(None, {stored.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        want = plain(x)
    # Two ways to sum six layers of at most 8 * 9 float32 products each: six standard deviations of their roundings.
    limit = 6 * math.sqrt(2 * 6 * 72) * torch.finfo(torch.float32).eps / 2 * float(want.abs().max())
    assert float((torch.from_numpy(got.copy()) - want).abs().max()) <= limit


def test_a_task_model_says_what_to_export_instead() -> None:
    with pytest.raises(TapsError, match="export merge_and_unload"):
        torch.export.export(adapted(), (images(),), {"task": "a"})


def test_data_parallel_is_refused_with_advice() -> None:
    with pytest.raises(TapsError, match="use DistributedDataParallel"):
        adapted()._replicate_for_data_parallel()


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_named_and_can_be_excluded() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    quantised = torch.ao.quantization.quantize_dynamic(base, {"0"}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModuleError, match="0: a quantised Linear holds its weight in a form"):
        TaskModel(quantised, TapsConfig(lam=0.5)).add_task("a", num_classes=3)
    model = TaskModel(quantised, TapsConfig(lam=0.5, exclude_modules=["0"]))
    model.add_task("a", num_classes=3)
    assert model(torch.randn(2, 4), task="a").shape == (2, 3)


def test_weights_of_other_kinds_are_named() -> None:
    class Packed(Tensor):
        pass

    packed, whole = nn.Linear(4, 4), nn.Linear(4, 4)
    packed.weight = nn.Parameter(packed.weight.detach().as_subclass(Packed))
    whole.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for layer, got in ((packed, "Packed of torch.float32"), (whole, "Tensor of torch.int8")):
        with pytest.raises(UnsupportedModuleError, match=f"0: expected a Linear with a plain .*{got}"):
            TaskModel(nn.Sequential(layer, nn.Linear(4, 2)), TapsConfig(lam=0.5)).add_task("a", num_classes=3)
