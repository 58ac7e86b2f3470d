"""The penalty's gradient on top of the loss's: as `backward` adds it, and whatever was estimated before."""

from __future__ import annotations

import pytest
import torch
from models import TinyNet, images, settle
from torch import nn

from taps_ext import TapsConfig, TaskModel, estimate, reference
from taps_ext.train.gradients import add_gradients


def model_of(**settings) -> TaskModel:
    model = TaskModel(settle(TinyNet()), TapsConfig(lam=0.7, **settings))
    model.add_task("t", num_classes=4)
    model.set_task("t")
    return model


@pytest.mark.parametrize("penalty", ["layer", "size"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_penalty_and_its_gradient(penalty: str, scale: float) -> None:
    """Of values of every sign, zero among them, to the rounding of a float32 sum of few terms."""
    model = model_of(penalty=penalty)
    gates = [gate for _, _, gate in model.state("t").gated()]
    values = torch.linspace(-0.3, 0.3, len(gates) | 1)[: len(gates)]
    with torch.no_grad():
        for gate, value in zip(gates, values, strict=True):
            gate.score.copy_(value)
    sizes = torch.tensor([gate.size for gate in gates], dtype=torch.float64)
    weights = torch.ones_like(sizes) if penalty == "layer" else sizes / sizes.mean()
    exact = values.double().requires_grad_()
    want = scale * reference.sparsity_loss(exact, weights, 0.7)
    want.backward()
    got = model.sparsity_loss("t", scale)
    got.backward()
    torch.testing.assert_close(got.double(), want, rtol=len(gates) * 2**-23, atol=0)
    for gate, gradient in zip(gates, exact.grad, strict=True):
        torch.testing.assert_close(gate.score.grad.double(), gradient, rtol=4 * 2**-24, atol=0)


def test_added_as_backward_adds() -> None:
    first, second = (nn.Parameter(torch.randn(5)) for _ in range(2))
    fresh = nn.Parameter(torch.randn(3))
    told: list[nn.Parameter] = []
    fresh.register_post_accumulate_grad_hook(told.append)

    def loss() -> torch.Tensor:
        return (first * second).sum() + first.sum() + fresh.sum()

    first.grad, second.grad = torch.ones(5), torch.ones(5)
    loss().backward()
    want = [parameter.grad.clone() for parameter in (first, second, fresh)]
    first.grad, second.grad, fresh.grad = torch.ones(5), torch.ones(5), None
    add_gradients(loss(), [first, second, fresh])
    for parameter, gradient in zip((first, second, fresh), want, strict=True):
        assert torch.equal(parameter.grad, gradient) and parameter.grad.is_contiguous()
    assert len(told) == 2
    add_gradients(loss().detach().requires_grad_(), [])


def test_gradients_share_no_memory() -> None:
    """What is done to one in place, as clipping does, is not done to others, nor to later calls."""
    for _ in range(2):
        a, b = (nn.Parameter(torch.zeros([])) for _ in range(2))
        add_gradients(a + b, [a, b])
        a.grad.mul_(10)
        assert (a.grad.item(), b.grad.item()) == (10.0, 1.0)
    wide = nn.Parameter(torch.zeros(4))
    add_gradients(wide.sum(), [wide])
    nn.utils.clip_grad_norm_([wide], 1.0)
    # torch divides by the norm and 1e-6; two roundings of float32.
    torch.testing.assert_close(wide.grad, torch.full((4,), 1 / (2 + 1e-6)), rtol=2**-22, atol=0)


@pytest.mark.parametrize("penalty", ["layer", "size"])
def test_an_estimate_leaves_nothing_behind(penalty: str) -> None:
    """It runs steps on tensors without storage, of which none may be met by a real step."""
    model = model_of(penalty=penalty)
    estimate(model, [images(2)])
    model.sparsity_loss("t").backward()
    scores = [gate.score for _, _, gate in model.state("t").gated()]
    assert all(type(score.grad) is torch.Tensor and score.grad.item() > 0 for score in scores)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None
    add_gradients(model.sparsity_loss("t"), parameters)
    assert all(type(score.grad) is torch.Tensor and score.grad.item() > 0 for score in scores)
