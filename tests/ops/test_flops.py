"""What torch's FLOP counter sees of the operators, against stock layers and by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TinyNet, images, settle
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from taps_ext import TapsConfig, TaskModel, extension, gated_conv2d, gated_linear, ops
from taps_ext.ops import foreach_reconstruct_, reconstruct_

if not ops.HAS_EXTENSION:
    pytest.skip("the extension is missing, and with it the operators", allow_module_level=True)

THRESHOLD = 0.1


def exact_convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any = None) -> int:
    """torch's own formula counts the weight's gradient once for each group."""
    mask = args[7]
    return 2 * grad.numel() * weight[0].numel() * (mask[0] + mask[1])


exact_convolution_backward._get_raw = True  # type: ignore[attr-defined]


def flops(run: Callable[[], object]) -> int:
    mapping = {torch.ops.aten.convolution_backward: exact_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def by_operator(run: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(name): count for name, count in counter.get_flop_counts().get("Global", {}).items()}


CASES = {  # input, weight, settings
    "rows": ((5, 7), (11, 7), None),
    "one row": ((7,), (11, 7), None),
    "sequences": ((2, 5, 7), (11, 7), None),
    "3x3": ((2, 6, 9, 11), (8, 6, 3, 3), {"padding": 1}),
    "strided": ((2, 6, 9, 11), (8, 6, 3, 3), {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": ((2, 6, 9, 11), (8, 6, 3, 2), {"dilation": (2, 3)}),
    "groups": ((3, 6, 9, 9), (8, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((3, 6, 9, 9), (12, 1, 5, 5), {"groups": 6, "stride": 2}),
    "same": ((2, 6, 9, 9), (8, 6, 3, 5), {"padding": "same"}),
    "no batch": ((6, 9, 9), (8, 6, 3, 3), {}),
    "no samples": ((0, 6, 9, 9), (8, 6, 3, 3), {}),
}


class Problem:
    """A layer and its stock twin; `product` is what one of its products counts."""

    def __init__(self, name: str) -> None:
        shape, weight, self.settings = CASES[name]
        self.x, self.weight, self.delta = torch.randn(shape), torch.randn(weight), torch.randn(weight)
        self.score, self.bias = torch.tensor(0.15), torch.randn(weight[0])
        self.product = flops(lambda: self.stock(self.x, self.weight))

    def stock(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.settings is None:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, **self.settings)

    def gated(self, **call: Any) -> Tensor:
        run = gated_linear if self.settings is None else gated_conv2d
        return run(self.x, self.weight, self.delta, self.score, self.bias, **(self.settings or {}), **call)

    def learns(self, *names: str) -> None:
        for name in names:
            getattr(self, name).requires_grad_()


def test_every_operator_has_a_formula() -> None:
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("taps_ext::")}
    known = {n for n in names if not n.startswith("_probe")}
    assert len(known) >= 6
    assert all(getattr(torch.ops.taps_ext, name) in flop_registry for name in known)


def test_an_older_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators are asked for when the package is imported; one that was compiled before is not half used."""
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("taps_ext::")}
    assert {*extension.OPERATORS} == {n for n in names if not n.startswith("_probe")}
    monkeypatch.setattr(extension, "OPERATORS", (*extension.OPERATORS, "newer"))
    with pytest.raises(ImportError, match="older than these sources and has no operator newer; run `make build`"):
        extension._loaded()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gate", [True, False, None])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_forward_counts_as_the_stock_layers(name, gate, gradients) -> None:
    problem = Problem(name)
    if gradients:
        problem.learns("delta", "score")
    with torch.set_grad_enabled(gradients):
        assert flops(lambda: problem.gated(gate=gate)) == problem.product
    assert problem.product > 0 or problem.x.numel() == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("score", [0.15, 0.05])
@pytest.mark.parametrize("host", [True, False], ids=["host", "score"])
def test_a_step_counts_as_the_stock_layers(name, score, host) -> None:
    """An input's gradient and a weight's: a closed layer's score asks for as many operations."""
    problem = Problem(name)
    problem.score.fill_(score)
    gate = score >= THRESHOLD if host else None

    def stock() -> None:
        x, weight = (t.detach().clone().requires_grad_() for t in (problem.x, problem.weight))
        problem.stock(x, weight).sum().backward()

    expected = flops(stock)
    assert expected == 3 * problem.product
    problem.learns("x", "delta", "score", "bias")
    assert flops(lambda: problem.gated(gate=gate).sum().backward()) == expected


@pytest.mark.parametrize("name", ["sequences", "groups", "strided"])
def test_what_is_not_asked_for_is_not_counted(name) -> None:
    for learns, gate, products in (
        (("delta", "score"), True, 2),  # as the first layer of a model
        (("x",), True, 2),
        (("x",), False, 2),
        (("delta",), False, 1),  # a closed Delta rests
        (("x", "delta"), False, 2),
        (("score",), False, 2),
        (("score",), True, 2),
        (("weight",), True, 2),
        (("x", "weight"), False, 3),
        (("bias",), True, 1),
    ):
        problem = Problem(name)
        problem.learns(*learns)
        found = flops(lambda p=problem, g=gate: y.sum().backward() if (y := p.gated(gate=g)).requires_grad else None)
        assert found == products * problem.product, (learns, gate)


@pytest.mark.parametrize("name", ["rows", "sequences", "groups", "3x3"])
def test_of_the_sampled_rows_alone(name) -> None:
    problem = Problem(name)
    problem.learns("x", "score")
    rows = torch.tensor([1] if name != "sequences" else [0, 3, 4])
    samples = 10 if name == "sequences" else len(problem.x)
    found = flops(lambda: problem.gated(gate=False, rows=rows, row_scale=samples / len(rows)).sum().backward())
    assert found == 2 * problem.product + problem.product * len(rows) // samples


@pytest.mark.parametrize("gate", [True, False, None])
@pytest.mark.parametrize("score", [0.15, 0.05])
def test_every_mask_of_the_backward_operators(gate, score) -> None:
    """Products that run: the input's, and one for the weight side if anything but a resting Delta wants it."""
    opened = score >= THRESHOLD if gate is None else gate
    for name, mask in itertools.product(("rows", "groups"), itertools.product([True, False], repeat=5)):
        problem = Problem(name)
        y = problem.gated(gate=gate)
        score_of = torch.tensor(score)
        common = (problem.weight, problem.delta, score_of, gate, THRESHOLD)
        if name == "rows":
            call = (torch.ops.taps_ext.gated_linear_backward, y, problem.x, *common, list(mask), None, 1.0)
        else:
            geometry = ([1, 1], [1, 1], [1, 1], 2, list(mask), None, 1.0)
            call = (torch.ops.taps_ext.gated_conv2d_backward, y, problem.x, [9, 9], *common, *geometry)
        side = mask[2] or mask[4] or (mask[1] and opened)
        assert flops(lambda c=call: c[0](*c[1:])) == (mask[0] + side) * problem.product, (name, mask)


def test_rebuilding_counts_nothing() -> None:
    weight, delta, score = torch.randn(8, 6), torch.randn(8, 6), torch.tensor(0.15)
    assert flops(lambda: reconstruct_(torch.empty_like(weight), weight, delta, score)) == 0
    outs = [torch.empty_like(weight) for _ in range(2)]
    assert flops(lambda: foreach_reconstruct_(outs, [weight] * 2, [delta] * 2, [score] * 2)) == 0
    assert flop_registry[torch.ops.taps_ext.reconstruct]() == 0


def test_eager_calls_make_way_for_the_counter() -> None:
    """Without it an open layer on a CPU is a plain function of the extension, which no mode sees."""
    x, weight, delta = torch.randn(4, 6), torch.randn(8, 6), torch.randn(8, 6)
    with torch.no_grad():
        assert by_operator(lambda: gated_linear(x, weight, delta, gate=True)) == {"taps_ext.gated_linear": 2 * 4 * 48}
    score = torch.tensor(0.15, requires_grad=True)
    delta.requires_grad_()
    x.requires_grad_()
    found = by_operator(lambda: gated_linear(x, weight, delta, score, gate=True).sum().backward())
    assert sum(found.values()) == 3 * 2 * 4 * 48


# ------------------------------------------------------------------------------------------- whole models


class Reads(nn.Module):
    """Weights that other code reads: an attention's, and a layer's whose forward nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(64, 16)
        self.read = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.flatten(2))
        x = F.linear(x, self.read.weight, self.read.bias)
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def task_of(base: nn.Module, score: float = 0.15, fraction: float = 1.0, **settings: Any) -> TaskModel:
    model = TaskModel(settle(base), TapsConfig(lam=0.5, gate_fraction=fraction), **settings)
    model.add_task("t", num_classes=4)
    with torch.no_grad():
        for _, part, _ in model.state("t").learned():
            part.gate.score.fill_(score)
    model.refresh_gates()
    model.set_task("t")
    return model


@pytest.mark.parametrize("base", [TinyNet, Reads])
def test_a_models_forward_counts_as_the_bases(base) -> None:
    x = images(4)
    plain = settle(
        base()
    ).train()  # in evaluation nn.MultiheadAttention is one function, which the counter does not know
    with torch.no_grad():
        expected = flops(lambda: plain(x))
        assert expected > 0
        for score in (0.15, 0.05):
            for gates in ("host", "device"):
                model = task_of(base(), score, gates=gates).train()
                assert flops(lambda m=model: m(x)) == expected
        merged = task_of(base()).merge_and_unload("t").train()
        assert flops(lambda: merged(x)) == expected


@pytest.mark.parametrize("base", [TinyNet, Reads])
@pytest.mark.parametrize("score", [0.15, 0.05], ids=["open", "closed"])
def test_a_step_counts_as_fine_tuning(base, score) -> None:
    x = images(4)
    plain, model = settle(base()).train().requires_grad_(True), task_of(base(), score).train()
    assert flops(lambda: model(x).sum().backward()) == flops(lambda: plain(x).sum().backward())


def test_a_sampled_step_counts_the_sample() -> None:
    """Of eight images two: a quarter of each closed layer's weight side."""
    x = images(8)
    exact = task_of(TinyNet(), 0.05).train()
    sampled = task_of(TinyNet(), 0.05, fraction=0.25).train()
    with torch.no_grad():
        forward = flops(lambda: exact(x)) - 2 * 8 * 12 * 4  # of the gated layers, without the head
    found = [flops(lambda m=m: m(x).sum().backward()) for m in (exact, sampled)]
    assert found[0] - found[1] == forward * 3 // 4


def test_modules_have_their_own_counts() -> None:
    model = task_of(TinyNet()).train()
    with FlopCounterMode(display=False, depth=9) as counter:
        model(images(4)).sum().backward()
    found = counter.get_flop_counts()
    product = 2 * 4 * 16 * 4 * 4 * 8 * 9
    own = {str(name): count for name, count in found["TaskModel.base.conv2"].items()}
    assert own == {"taps_ext.gated_conv2d": product, "taps_ext.gated_conv2d_backward": 2 * product}
    assert sum(found["TaskModel.base.hidden"].values()) == 3 * 2 * 4 * 12 * 16
