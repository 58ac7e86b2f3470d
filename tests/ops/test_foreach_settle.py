"""foreach_settle: what it makes of the gradients of many W_t, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from taps_ext import ops

pytestmark = pytest.mark.skipif(ops._C is None, reason="no extension")
OP = torch.ops.taps_ext.foreach_settle if ops._C is not None else None


def settled(**changes) -> None:
    lists = {
        "delta_gradients": [torch.empty(4, 3)],
        "score_gradients": [torch.empty([])],
        "gradients": [torch.randn(4, 3)],
        "deltas": [torch.randn(4, 3)],
        "scores": [torch.tensor(0.2)],
        "gates": [1],
    }
    OP(*{**lists, **changes}.values(), 0.1)


def test_nothing_asked_for_is_nothing_done() -> None:
    none = torch.empty(0)
    settled(delta_gradients=[none], score_gradients=[none], gradients=[torch.full((4, 3), torch.nan)])


@pytest.mark.parametrize("gate, is_open", [(1, True), (0, False), (-1, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values(gate: int, is_open: bool, dtype: torch.dtype) -> None:
    g, d = torch.randn(5, 7).to(dtype), torch.randn(5, 7)
    delta, score = torch.empty(5, 7), torch.empty([], dtype=torch.float64)
    settled(delta_gradients=[delta], score_gradients=[score], gradients=[g], deltas=[d], gates=[gate])
    assert torch.equal(delta, g.float() if is_open else torch.zeros(5, 7))
    products = g.double() * d.double()
    assert (score - products.sum()).abs() <= products.abs().sum() * 72 * 2**-53


def test_in_place() -> None:
    g, d = torch.randn(4, 3), torch.randn(4, 3)
    before, score = g.clone(), torch.empty([])
    settled(delta_gradients=[g], score_gradients=[score], gradients=[g], deltas=[d], gates=[-1])
    assert torch.equal(g, before)
    torch.testing.assert_close(score, (before * d).sum())


def shared() -> torch.Tensor:
    return torch.randn(4, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gates": [2]}, "gates"),
        ({"deltas": []}, "deltas: expected 1 entries like gradients, got 0"),
        ({"deltas": [torch.randn(3, 4)]}, "delta: expected shape"),
        ({"delta_gradients": [torch.empty(4, 4)]}, "delta_gradient: expected shape"),
        ({"delta_gradients": [torch.empty(4, 3, dtype=torch.bfloat16)]}, "delta_gradient: expected dtype"),
        ({"delta_gradients": [torch.empty(1, 3).expand(4, 3)]}, "delta_gradient: expected distinct memory"),
        ({"score_gradients": [torch.empty(2)]}, "score_gradient: expected one element"),
        ({"score_gradients": [torch.empty([], dtype=torch.float16)]}, "score_gradient: expected one element"),
        ({"scores": [None], "gates": [-1]}, "gate: expected a bool, or a score"),
    ],
)
def test_refusals(changes, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        settled(**changes)


@pytest.mark.parametrize("which", ["gradients", "deltas", "scores", "delta_gradients"])
def test_a_score_gradient_of_another_ones_memory(which: str) -> None:
    own = torch.tensor(0.2) if which == "scores" else shared()
    with pytest.raises(RuntimeError, match="score_gradient: expected memory of its own"):
        settled(**{which: [own], "score_gradients": [own.view(-1)[:1]], "gates": [-1]})


def test_a_delta_gradient_of_another_ones_memory() -> None:
    own = shared()
    with pytest.raises(RuntimeError, match="delta_gradient: expected memory of its own"):
        settled(delta_gradients=[own], deltas=[own])
    two = [shared(), shared()]
    with pytest.raises(RuntimeError, match="memory that no other item writes"):
        settled(
            delta_gradients=[two[0], two[1]],
            score_gradients=[torch.empty([]), torch.empty([])],
            gradients=[shared(), two[0]],
            deltas=[shared(), shared()],
            scores=[None, None],
            gates=[1, 1],
        )
