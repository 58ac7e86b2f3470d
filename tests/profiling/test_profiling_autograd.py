"""profile and estimate where autograd's graph begins before the model, or outlives its forward."""

import pytest
from test_profiling import ROOFS, Wide, build, images
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from taps_ext import estimate, profile


class Rerun(Wide):
    """Recomputed in backward, which reaches it through its input's gradient alone."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


class Keeps(Wide):
    """Keeps its result."""

    seen: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [super().forward(x)]
        return self.seen[0]


@pytest.mark.parametrize("measured", [False, True], ids=["estimate", "profile"])
def test_an_input_that_wants_its_gradient_gets_one(measured) -> None:
    model, x = build(Rerun()), images().requires_grad_()
    deltas = sum(part.change.delta.nbytes for _, part, _ in model.state("t").learned())
    found = profile(model, (x,), task="t", machine=ROOFS).memory if measured else estimate(model, (x,), task="t")
    assert found.optimizer >= deltas  # momentum of what got a gradient
    assert x.grad is None


def test_what_a_forward_keeps_does_not_stop_an_estimate() -> None:
    model, x = build(Keeps()), images()
    expected = estimate(model, (x,), task="t")
    model.train()
    model(x, task="t")
    assert any(getattr(module, "seen", [x])[0].grad_fn is not None for module in model.modules())
    assert estimate(model, (x,), task="t") == expected
