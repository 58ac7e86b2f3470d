"""Gated layers under torch's own machinery: autocast, opcheck, derivatives of a derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_ops import draw, linear_case

from taps_ext import gated_conv2d, gated_linear, ops

pytestmark = pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")


@pytest.mark.parametrize("gate", [True, False, None])
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_autocast_equals_stock_autocast_on_the_sum(op, gate) -> None:
    """bf16 autocast over float32 weights: the stock op on W (closed) or W + Delta (open), to the bit."""
    torch.manual_seed(10)
    if op == "linear":
        x, w, d, s, b = (t.detach() for t in linear_case(torch.float32, (9,)))
        stock, ours = F.linear, gated_linear
        arguments: dict = {}
    else:
        x, w, d = draw(2, 4, 8, 8).float(), draw(6, 4, 3, 3).float(), draw(6, 4, 3, 3).float()
        s, b = torch.tensor(0.15), draw(6).float()
        stock, ours = F.conv2d, gated_conv2d
        arguments = {"padding": 1}
    with torch.autocast("cpu", torch.bfloat16):
        want = stock(x, w if gate is False else w + d, b, **arguments)
        got = ours(x, w, d, s, b, **arguments, gate=gate)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_autocast_gradients_have_the_parameters_types() -> None:
    case = linear_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        gated_linear(*case, gate=True).float().square().sum().backward()  # backward inside the region, too
    assert all(t.grad.dtype == torch.float32 for t in case)


@pytest.mark.parametrize("gate", [True, False, None])
def test_opcheck(gate) -> None:
    torch.manual_seed(11)
    x, w, d, s, b = linear_case(torch.float32, (3,), 5, 4)
    if gate is False:
        d = d.detach()
    rows = torch.tensor([2, 0])
    for sample in ((), (rows, 1.5)):
        torch.library.opcheck(torch.ops.taps_ext.gated_linear.default, (x, w, d, s, b, gate, 0.1, *sample))
    torch.library.opcheck(torch.ops.taps_ext.gated_linear.default, (x, w.detach(), d, s, b, gate, 0.1, rows, 1.5))
    mask = [True, gate is not False, True, True, True]
    detached = [t.detach() for t in (x, w, d, s)]
    torch.library.opcheck(
        torch.ops.taps_ext.gated_linear_backward.default,
        (torch.randn(3, 4), *detached, gate, 0.1, mask, None, 1.0),
    )
    image = torch.randn(2, 4, 6, 6, requires_grad=True)
    kernel, extra = (
        torch.randn(6, 2, 3, 3, requires_grad=True),
        torch.randn(6, 2, 3, 3, requires_grad=gate is not False),
    )
    geometry = ([2, 1], [1, 1], [1, 1], 2)
    bias = torch.randn(6, requires_grad=True)
    for own, *sample in ((kernel,), (kernel.detach(), torch.tensor([1]), 2.0)):
        arguments = (image, own, extra, s, bias, *geometry, gate, 0.1, *sample)
        torch.library.opcheck(torch.ops.taps_ext.gated_conv2d.default, arguments)
    torch.library.opcheck(
        torch.ops.taps_ext.gated_conv2d_backward.default,
        (
            torch.randn(2, 6, 3, 6),
            image.detach(),
            [6, 6],
            kernel.detach(),
            extra.detach(),
            s.detach(),
            gate,
            0.1,
            *geometry,
            mask,
            None,
            1.0,
        ),
    )
    out = torch.empty(4, 5)
    torch.library.opcheck(torch.ops.taps_ext.reconstruct.default, (out, *detached[1:], gate, 0.1))


def test_double_backward_is_refused() -> None:
    case = linear_case(torch.float64)
    (grad,) = torch.autograd.grad(gated_linear(*case, gate=True).square().sum(), case[0], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("asked", range(5))
def test_what_was_not_asked_for_has_its_own_type(asked: int) -> None:
    """Empty results too are traced as they are: each in the type that its gradient would have."""
    x, grad = torch.randn(3, 6, dtype=torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    w, d = torch.randn(4, 6, dtype=torch.bfloat16), torch.randn(4, 6)
    mask = [i == asked for i in range(5)]
    arguments = (grad, x, w, d, torch.tensor(0.2, dtype=torch.float64), True, 0.1, mask, None, 1.0)
    torch.library.opcheck(torch.ops.taps_ext.gated_linear_backward.default, arguments)


@pytest.mark.parametrize("name", ["dense", "transposed", "gaps", "expanded"])
def test_gradients_are_traced_in_their_layout(name) -> None:
    """Of a Delta and a W that are not dense too: compiled graphs rely on the strides."""
    base = torch.randn(16, 16)
    layouts = {"dense": base[:8, :], "transposed": base[:, :8].clone().t(), "gaps": base.t()[:8, :]}
    d = layouts[name] if name in layouts else base[:1].expand(8, 16)
    d = d[:, ::2] if name == "gaps" else d[:, : d.shape[1]]
    w = d if name == "expanded" else torch.empty_strided(d.shape, d.stride()).fill_(1.0)
    mask = [True] * 5
    arguments = (torch.randn(3, 8), torch.randn(3, d.shape[1]), w, d, torch.tensor(0.2), True, 0.1, mask, None, 1.0)
    torch.library.opcheck(torch.ops.taps_ext.gated_linear_backward.default, arguments, test_utils="test_faketensor")
