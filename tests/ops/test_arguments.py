"""What the functions say of arguments of another type, on another device, or without memory; nothing is guessed."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from taps_ext import gated_conv2d, gated_linear, ops

CASES = {"linear": ((4, 5), (6, 5), gated_linear), "conv2d": ((2, 3, 7, 7), (6, 3, 3, 3), gated_conv2d)}


@pytest.fixture(params=CASES)
def layer(request):
    """A call with some arguments replaced."""
    of_input, of_weight, function = CASES[request.param]
    good = {
        "input": torch.randn(of_input),
        "weight": torch.randn(of_weight),
        "delta": torch.randn(of_weight),
        "score": torch.tensor(0.5),
        "bias": torch.randn(6),
    }

    def call(gradients: bool = False, **changed) -> Tensor:
        arguments = {**good, **changed}
        settings = {key: arguments.pop(key) for key in ("gate", "rows", "threshold") if key in arguments}
        with torch.set_grad_enabled(gradients):
            return function(*arguments.values(), **settings)

    return call


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("gate", ["closed", "", 1, 0.0, (False,), torch.tensor(True)])
def test_a_gate_is_a_bool(layer, gate, gradients) -> None:
    """Truth is not enough: "closed" has it."""
    with pytest.raises(TypeError, match=f"gate: expected True, False or None, got {re.escape(repr(gate))}"):
        layer(gradients, gate=gate)


@pytest.mark.parametrize("gate", [True, False, None])
@pytest.mark.parametrize("name", ["input", "weight", "delta", "score", "bias"])
@pytest.mark.parametrize("value", [0.5, [1.0], "x"])
def test_a_tensor_is_a_tensor(layer, name, value, gate) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a tensor, got {type(value).__name__}"):
        layer(**{name: value}, gate=gate)


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
@pytest.mark.parametrize("name", ["weight", "delta", "score", "bias"])
def test_one_operand_without_values(name) -> None:
    """The meta device has none: a result would be what was in memory."""
    good = {"weight": torch.randn(6, 5), "delta": torch.randn(6, 5), "score": torch.tensor(0.5), "bias": torch.randn(6)}
    good["input"] = torch.randn(4, 5)
    good[name] = good[name].to("meta")
    with pytest.raises(RuntimeError, match=r": expected a tensor on \w+ like input, got one on \w+"):
        gated_linear(good["input"], good["weight"], good["delta"], good["score"], good["bias"])


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
@pytest.mark.parametrize("name", ["input", "weight", "delta", "bias"])
def test_memory_that_was_freed(name) -> None:
    shapes = {"input": (4, 5), "weight": (6, 5), "delta": (6, 5), "bias": (6,)}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor of shape .* whose storage has been freed"):
        gated_linear(*(tensors[key] for key in ("input", "weight", "delta")), torch.tensor(0.5), tensors["bias"])


@pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")
def test_what_came_is_said(layer) -> None:
    with pytest.raises(RuntimeError, match="delta: expected dtype float32, float64, bfloat16 or float16, got int32"):
        gated_linear(torch.randn(4, 5), torch.randn(6, 5), torch.ones(6, 5, dtype=torch.int32), gate=True)
    with pytest.raises(
        RuntimeError, match="rows: expected int64 indices of shape .R., got 1 dimensions of dtype int32"
    ):
        score = torch.tensor(0.05, requires_grad=True)
        rows = torch.ones(2, dtype=torch.int32)
        gated_linear(torch.randn(4, 5), torch.randn(6, 5), torch.randn(6, 5), score, gate=False, rows=rows)
    with pytest.raises(RuntimeError, match="threshold: expected a number, got NaN"):
        layer(threshold=float("nan"))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_bias_of_a_closed_layer(gradients) -> None:
    """As of an open one: by its shape, and of any type."""
    x, w, d = torch.randn(4, 5, requires_grad=gradients), torch.randn(6, 5), torch.randn(6, 5)
    bias = torch.randn(6, dtype=torch.float64)
    assert torch.equal(gated_linear(x, w, d, None, bias, gate=False), F.linear(x, w, bias.float()))
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[6\], got \[5\]"):
        gated_linear(x, w, d, None, torch.randn(5), gate=False)
    image, kernel = torch.randn(1, 5, 3, 3, requires_grad=gradients), torch.randn(6, 5, 1, 1)
    want = F.conv2d(image, kernel, bias.float())
    assert torch.equal(gated_conv2d(image, kernel, torch.randn(6, 5, 1, 1), None, bias, gate=False), want)


@pytest.mark.parametrize("outs", [None, 3, iter([])])
def test_lists_are_lists(outs) -> None:
    with pytest.raises(TypeError, match="outs: expected a list or a tuple, got "):
        ops.foreach_reconstruct_(outs, [], [])


def test_derivatives_of_a_closed_score_without_grad_mode() -> None:
    """Forward mode and functorch's jvp do not ask for grad mode: <dL/dy, x Delta^T>, though the layer is closed."""
    x, w, d, score = torch.randn(3, 5), torch.randn(6, 5), torch.randn(6, 5), torch.tensor(0.0)
    with torch.no_grad():
        by_functorch = torch.func.jvp(lambda s: gated_linear(x, w, d, s, gate=False), (score,), (torch.tensor(1.0),))[1]
        with forward_ad.dual_level():
            y = gated_linear(x, w, d, forward_ad.make_dual(score, torch.tensor(1.0)), gate=False)
            by_dual = forward_ad.unpack_dual(y).tangent
    for tangent in (by_functorch, by_dual):
        torch.testing.assert_close(tangent, F.linear(x, d))
