"""profile and estimate where autograd's graph begins before the model, or outlives its forward."""

import pytest
import torch
from test_profiling import ROOFS, Wide, build, images
from torch import Tensor, nn
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


class Repeated(nn.Module):
    """Two layers that checkpointing repeats in backward, or that it leaves alone (`reentrant=None`)."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

        if self.reentrant is None:
            return self.fc(inner(x))
        made: Tensor = checkpoint(inner, x, use_reentrant=self.reentrant)
        return self.fc(made)


@pytest.mark.parametrize("closed", [(), ("first", "second")], ids=["open", "closed"])
@pytest.mark.parametrize(("reentrant", "products"), [(None, (2, 3)), (False, (3, 4)), (True, (3, 4))])
def test_what_checkpointing_repeats_is_counted_once_more(reentrant, products, closed) -> None:
    """A forward, its repetition, and the gradients to the input (the second layer's alone) and to the weight. torch
    leaves the repetition in the midst of the second layer, whose result nobody wants."""
    model, x = build(Repeated(reentrant), closed=closed), torch.randn(8, 16)
    if reentrant:  # which asks for gradients through its inputs alone
        x.requires_grad_()
        products = (products[0] + 1, products[1])
    found = profile(model, (x,), task="t", steps=2, machine=ROOFS)
    assert tuple(row.operations for row in found.rows) == tuple(n * 2 * 8 * 16 * 16 for n in products)
    assert [row.calls for row in found.rows] == [1 if reentrant is None else 2] * 2
    assert all(row.forward > 0 and row.backward > 0 for row in found.rows)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("phase", ["train", "infer"])
def test_a_profile_leaves_the_casts_that_it_found(phase: str, merged: bool) -> None:
    """Those of closed layers, which autocast is to cast once; and of a merged task's weights."""
    model, x = build(Repeated(None), closed=("first",)), torch.randn(8, 16)
    if merged and phase == "infer":
        model.merge_task("t")
    holders = [*model.modules(), *model.state("t").installed.values()]
    profile(model, (x,), task="t", phase=phase, amp="bf16", steps=1, machine=ROOFS)
    assert not any("_taps_cast" in module.__dict__ for module in holders)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.eval()(x, task="t")
    kept = {id(module): module.__dict__["_taps_cast"] for module in holders if "_taps_cast" in module.__dict__}
    profile(model, (x,), task="t", phase=phase, amp="bf16", steps=1, machine=ROOFS)
    assert kept and kept == {id(m): m.__dict__["_taps_cast"] for m in holders if "_taps_cast" in m.__dict__}
