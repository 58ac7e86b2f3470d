"""What gated layers return is no view of anything: what follows may change it in place, in training as well."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from taps_ext import gated_conv2d, gated_linear, ops

C = ops._C
if C is None:
    pytest.skip("the extension is missing, and with it the operators", allow_module_level=True)

OPERATORS = torch.ops.taps_ext
SHAPES = [(6,), (4, 6), (2, 3, 6), (2, 3, 5, 6), (1, 1, 6), (0, 3, 6)]
GATES = (True, False, None)


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of its memory."""
    return torch.stack((tensor, tensor), -1)[..., 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", [None, "fused", "rebuild"])
def test_the_operator_of_linear_layers(shape, path) -> None:
    torch.manual_seed(0)
    w, d, score, b = torch.randn(9, 6), torch.randn(9, 6), torch.tensor(0.2), torch.randn(9)
    cases = itertools.product(GATES, (True, False), (None, b), (torch.randn(shape), spread(torch.randn(shape))))
    for gate, training, bias, x in cases:
        if path == "fused" and (gate is False or training or 0 in shape or x.stride(-1) != 1):
            continue
        C.force_path(path)
        try:
            y = OPERATORS.gated_linear(x, w, d, score, bias, gate, 0.1, None, 1.0, training)
        finally:
            C.force_path(None)
        assert y.shape == (*shape[:-1], 9) and y._base is None and not y._is_view() and y.is_contiguous()
        if path != "fused" and (training or path == "rebuild" or gate is False):
            assert torch.equal(y, F.linear(x, w if gate is False else w + d, bias))
    for gate, mask in itertools.product(GATES, ([True] * 5, [True, False, False, False, False])):
        for dy in (
            torch.randn(*shape[:-1], 9),
            spread(torch.randn(*shape[:-1], 9)),
            torch.ones(1).expand(*shape[:-1], 9),
        ):
            made = OPERATORS.gated_linear_backward(dy, x, w, d, score, gate, 0.1, mask, None, 1.0)
            assert all(grad._base is None and not grad._is_view() for grad in made)
            assert made[0].shape == shape


@pytest.mark.parametrize("shape", [(4, 9, 9), (2, 4, 9, 9)], ids=str)
def test_the_operator_of_convolutions(shape) -> None:
    torch.manual_seed(1)
    x, w, d = torch.randn(shape), torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    score, b, geometry = torch.tensor(0.2), torch.randn(6), ([1, 1], [1, 1], [1, 1], 1)
    for gate, training, bias in itertools.product(GATES, (True, False), (None, b)):
        y = OPERATORS.gated_conv2d(x, w, d, score, bias, *geometry, gate, 0.1, None, 1.0, training)
        assert y._base is None and not y._is_view()
        made = OPERATORS.gated_conv2d_backward(
            torch.randn_like(y), x, [9, 9], w, d, score, gate, 0.1, *geometry, [True] * 5, None, 1.0
        )
        assert made[0].shape == shape and all(grad._base is None and not grad._is_view() for grad in made)


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [True, False])
def test_in_place_after_a_linear_layer_in_training(shape, gate, bias) -> None:
    """Through the operator, the functions of the extension, and torch's own for a closed layer at rest."""
    torch.manual_seed(2)
    x, w = torch.randn(shape), torch.randn(9, 6)
    learned = [torch.randn(9, 6), torch.tensor(0.2), torch.randn(9) if bias else None]
    is_open = gate is not False
    found = []
    for scored in (True, False):
        own = x.clone().requires_grad_()
        d, score, b = (None if t is None else t.clone().requires_grad_(scored) for t in learned)
        y = gated_linear(own, w, d, score, b, gate=gate)
        y.mul_(2.0).add_(1.0)
        y.square().sum().backward()
        found.append((y.detach(), own.grad))
    own = x.clone().requires_grad_()
    y = F.linear(own, w + learned[0] if is_open else w, learned[2]) * 2.0 + 1.0
    y.square().sum().backward()
    for got in found:
        assert torch.equal(got[0], y.detach())
        torch.testing.assert_close(got[1], own.grad)


@pytest.mark.parametrize("gate", GATES)
def test_in_place_after_a_convolution_in_training(gate) -> None:
    torch.manual_seed(3)
    for shape in ((4, 9, 9), (2, 4, 9, 9)):
        x, w, d = torch.randn(shape, requires_grad=True), torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
        y = gated_conv2d(x, w, d.requires_grad_(), torch.tensor(0.2, requires_grad=True), padding=1, gate=gate)
        y.relu_()
        y.sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
