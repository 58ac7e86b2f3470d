"""Low rank of mixed batches: each row by the A and B of its own task, and every gradient."""

from __future__ import annotations

import random

import pytest
import torch
from tolerance import bound
from torch import Tensor

from taps_ext import mixed_lowrank, reference

F64 = torch.float64


def drawn(seed: int, kind: torch.dtype) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], Tensor, list[float]]:
    """Input, A and B of each task, ids, scales; some tasks have no factors, some no rows."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    samples, tasks, per = chance.choice([0, 1, 4, 11]), chance.choice([1, 2, 5]), chance.choice([1, 1, 3, 20])
    n, k = chance.choice([1, 5, 24]), chance.choice([1, 7, 40])
    a: list[Tensor | None] = []
    b: list[Tensor | None] = []
    for task in range(tasks):
        rank = chance.choice([1, 2, 8])
        none = task > 0 and chance.random() < 0.25
        a.append(None if none else torch.randn(rank, k, dtype=F64).to(kind).requires_grad_())
        b.append(None if none else torch.randn(n, rank, dtype=F64).to(kind).requires_grad_())
    ids = torch.tensor([chance.randrange(-1, tasks) for _ in range(samples)], dtype=torch.int64)
    leading = [samples, per] if per > 1 and chance.random() < 0.5 else [samples * per]
    x = torch.randn(*leading, k, dtype=F64).to(kind).requires_grad_()
    return x, a, b, ids, [chance.choice([1.0, 2.0, 0.25]) for _ in range(tasks)]


def looped(x: Tensor, a: list, b: list, ids: Tensor, scales: list[float]) -> Tensor:
    """Row by row."""
    rows = x.reshape(-1, x.shape[-1])
    n = next(up.shape[0] for up in b if up is not None)
    per = rows.shape[0] // len(ids) if len(ids) else 0
    made = []
    for row in range(rows.shape[0]):
        task = int(ids[row // per])
        none = task < 0 or a[task] is None
        made.append(rows[row, :0].new_zeros(n) if none else scales[task] * (b[task] @ (a[task] @ rows[row])))
    output = torch.stack(made) if made else rows.new_zeros(0, n)
    return output.reshape(*x.shape[:-1], n)


@pytest.mark.parametrize("run", [mixed_lowrank, reference.mixed_lowrank], ids=["operator", "reference"])
def test_random_draws_equal_separate_products(run) -> None:
    for seed in range(60):
        case, other = drawn(seed, F64), drawn(seed, F64)
        y, want = run(*case), looped(*other)
        torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(run(*case), want, rtol=1e-10, atol=1e-10)
        if not want.requires_grad:
            continue
        grad = torch.randn_like(want)
        y.backward(grad)
        want.backward(grad)
        for mine, theirs in zip([case[0], *case[1], *case[2]], [other[0], *other[1], *other[2]], strict=True):
            if mine is None:
                continue
            if theirs.grad is None:  # an absent task's
                assert mine.grad is None or not mine.grad.any()
            else:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types(kind: torch.dtype) -> None:
    """Two products, the inner rounded to the type as a layer's result is: each within its bound."""
    for seed in range(100, 120):
        x, a, b, ids, scales = drawn(seed, kind)
        exact = looped(
            x.double(), *([None if f is None else f.double() for f in factors] for factors in (a, b)), ids, scales
        )
        y = mixed_lowrank(x, a, b, ids, scales).detach()
        assert y.dtype == kind
        if not exact.numel():
            continue
        k, rank = x.shape[-1], max(down.shape[0] for down in a if down is not None)
        ones = torch.ones(1)
        inner = x.detach().double().square().mean().sqrt() * k**0.5 * ones  # the size of x A^T, of A's elements of one
        limit = 2.0 * (bound(kind, rank, inner, 3 * ones) + rank**0.5 * bound(kind, k, x, 3 * ones))
        assert float((y.double() - exact.detach()).abs().max()) <= limit, seed


def test_an_absent_task_gets_no_gradient() -> None:
    x = torch.randn(4, 6)
    a, b = ([torch.randn(s, requires_grad=True) for _ in range(3)] for s in ((2, 6), (5, 2)))
    mixed_lowrank(x, a, b, torch.tensor([0, 2, -1, 0]), [1.0] * 3).sum().backward()
    assert [f.grad is not None for f in (*a, *b)] == [True, False, True] * 2


def test_autocast() -> None:
    x, a, b = torch.randn(4, 6), torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_lowrank(x, [a], [b], torch.tensor([0, 0, -1, 0]), [2.0])
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad is not None and a.grad.dtype == torch.float32


def test_gradcheck() -> None:
    ids = torch.tensor([1, -1, 0])
    shapes = ((3, 2, 4), (2, 4), (1, 4), (3, 2), (3, 1))
    tensors = [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda x, a, c, b, d: mixed_lowrank(x, [a, c], [b, d], ids, [2.0, 0.5]), tensors)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"a": [None], "b": [None]}, ValueError, "b: expected a tensor for one task at least"),
        ({"b": [None]}, ValueError, r"b\[0\]: expected a tensor where a has one"),
        ({"a": [torch.randn(2, 5)]}, ValueError, r"a\[0\]: expected shape \[r, 6\]"),
        ({"b": [torch.randn(5, 3)]}, ValueError, r"b\[0\]: expected shape \[5, 2\]"),
        ({"scales": [1.0, 2.0]}, ValueError, "scales: expected 1 entries"),
        ({"a": [torch.randn(2, 6, dtype=F64)]}, TypeError, r"a\[0\]: expected dtype torch.float32"),
        ({"task_ids": torch.tensor([0, 1, 0, 0])}, (RuntimeError, ValueError), "task_ids.*expected -1 for the base"),
    ],
)
def test_refusals(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "input": torch.randn(4, 6),
        "a": [torch.randn(2, 6)],
        "b": [torch.randn(5, 2)],
        "task_ids": torch.tensor([0, 0, -1, 0]),
        "scales": [1.0],
    }
    with pytest.raises(error, match=message):
        mixed_lowrank(**{**arguments, **changes})
