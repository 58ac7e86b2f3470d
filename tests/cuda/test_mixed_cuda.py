"""Mixed batches on a GPU: every row by the W_t of its own task, ids on the device and on the host, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_cases import Batch, looped
from tolerance import assert_close, bound, rms
from torch import Tensor

from taps_ext import mixed_conv2d, mixed_linear, mixed_lowrank, reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KINDS = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
IDS = [3, -1, 0, 3, 1, -1, 0, 0, 4, 3]
GATES: list[bool | None] = [None, False, True, True, None]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).cuda()


def linear_batch(kind: torch.dtype, delta: torch.dtype, per: int, n: int = 96, k: int = 136) -> Batch:
    torch.manual_seed(0)
    deltas: list[Tensor | None] = [None if task == 2 else draw(n, k, dtype=delta) for task in range(5)]
    scores: list[Tensor | None] = [torch.tensor(s, device="cuda") for s in (0.2, 0.2, 0.05, 0.05, 0.05)]
    x = draw(len(IDS), per, k, dtype=kind)
    return Batch(x, draw(n, k, dtype=kind), deltas, scores, torch.tensor(IDS), draw(n, dtype=kind), GATES)


def run(batch: Batch, ids: Tensor) -> Tensor:
    return mixed_linear(*batch[:4], ids, batch.bias, gates=batch.gates)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("per", [1, 3, 130])
@pytest.mark.parametrize("kind, delta", KINDS, ids=str)
def test_linear(kind: torch.dtype, delta: torch.dtype, per: int, where: str) -> None:
    """Few rows a task are grouped; many, of ids on the host, are each task's own product."""
    got = linear_batch(kind, delta, per).detached()
    want = got.detached(double=True)
    y, expected = run(got, got.task_ids.to(where)), looped(want)
    wt = torch.stack([d for d in want.deltas if d is not None]).abs().amax(0) + want.weight.abs()
    assert_close(y, expected, kind, got.input.shape[-1] + 1, got.input, wt)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    rows, (n, k) = y.numel() // y.shape[-1], got.weight.shape
    for mine, other in zip(got.leaves(), want.leaves(), strict=True):
        if other.grad is None or mine.grad is None:
            assert mine.grad is None or not mine.grad.any()
            assert other.grad is None or not other.grad.any()
            continue
        if mine.numel() == 1:
            factor = next(d for d, s in zip(got.deltas, got.scores, strict=True) if s is mine)
            limit = bound(kind, rows, grad, got.input, factor if factor is not None else wt, outer=n * k)
        elif mine is got.input:
            limit = bound(kind, n, grad, wt)
        else:
            limit = bound(kind, rows, grad, got.input) + bound(kind, rows, grad)
        assert (mine.grad.double() - other.grad).abs().max() <= limit


@pytest.mark.parametrize("kernel, where", [(1, "cuda"), (1, "cpu"), (3, "cpu")])
def test_convolution(kernel: int, where: str) -> None:
    torch.manual_seed(0)
    shape, last = (24, 16, kernel, kernel), torch.channels_last
    x, weight = draw(20, 16, 6, 5, dtype=BF16).to(memory_format=last), draw(*shape, dtype=BF16)
    deltas, ids = [draw(*shape, dtype=F32) for _ in range(5)], torch.tensor(IDS)
    y = mixed_conv2d(x, weight, deltas, None, ids.to(where), padding=kernel // 2, gates=[True] * 5)
    exact: list[Tensor] = [d.double() for d in deltas]
    want = reference.mixed_conv2d(
        x.double(), weight.double(), exact, [None] * 5, ids.cuda(), padding=kernel // 2, gates=[True] * 5
    )
    assert_close(y, want, BF16, weight[0].numel(), x, weight.double() + exact[0])
    assert y.is_contiguous(memory_format=last)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", [BF16, F32], ids=str)
def test_low_rank(kind: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    x, ids = draw(10, 3, 64, dtype=kind), torch.tensor(IDS)
    a = [draw(r, 64, dtype=kind).requires_grad_() for r in (4, 2, 8, 1, 3)]
    b = [draw(32, r, dtype=kind).requires_grad_() for r in (4, 2, 8, 1, 3)]
    y = mixed_lowrank(x, a, b, ids.to(where), [0.5, 1.0, 2.0, 1.5, 1.0])
    twins = [[t.detach().double().requires_grad_() for t in part] for part in (a, b)]
    want = reference.mixed_lowrank(x.double(), *twins, ids.cuda(), [0.5, 1.0, 2.0, 1.5, 1.0])
    limit = bound(kind, 64 + 8, x) * 2 * 64**0.5  # two products in turn, scales up to two
    assert (y.double() - want).abs().max() <= limit
    grad = torch.randn_like(y)
    first = torch.autograd.grad(y, [*a, *b], grad, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(y, [*a, *b], grad, allow_unused=True)
    assert all(p is q or torch.equal(p, q) for p, q in zip(first, again, strict=True))  # one order of sums
    exact = torch.autograd.grad(want, [*twins[0], *twins[1]], grad.double(), allow_unused=True)
    for mine, other in zip(first, exact, strict=True):
        if other is not None and mine is not None:
            assert (mine.double() - other).abs().max() <= 2 * 64**0.5 * bound(kind, 64 * 30, grad, x)


def test_ids_of_no_task_are_nan() -> None:
    batch = linear_batch(BF16, F32, 2).detached(grad=False)
    ids = torch.tensor([0, 5, -1, -2, 1, 3, 1 << 40, 4, 0, -1])
    bad = torch.tensor([False, True, False, True, False, False, True, False, False, False])
    for gates in (GATES, [False] * 5):
        y = run(batch._replace(gates=gates), ids.cuda())
        assert torch.equal(y.isnan().any(2).any(1).cpu(), bad) and y.isnan().all(2).all(1).cpu().equal(bad)
    with pytest.raises(RuntimeError, match=r"task_ids\[1\]: expected -1 for the base, or one of 5 tasks, got 5"):
        run(batch, ids)


def test_closed_for_all_is_the_stock_layer() -> None:
    batch = linear_batch(BF16, F32, 2).detached(grad=False)._replace(gates=[False] * 5)
    want = torch.nn.functional.linear(batch.input, batch.weight, batch.bias)
    for where in ("cpu", "cuda"):
        assert torch.equal(run(batch, batch.task_ids.to(where)), want)


@pytest.mark.parametrize("kind", [F32, torch.float64], ids=str)
def test_what_ids_on_the_device_cannot_do(kind: torch.dtype) -> None:
    batch = linear_batch(kind, kind, 2).detached(grad=False)
    with pytest.raises(RuntimeError, match="task_ids: expected a tensor on the CPU"):
        run(batch, batch.task_ids.cuda())
    x = torch.randn(10, 8, 4, 4, device="cuda", dtype=BF16)
    weight = torch.randn(8, 8, 3, 3, device="cuda", dtype=BF16)
    with pytest.raises(RuntimeError, match="single pixels"):
        mixed_conv2d(x, weight, [weight] * 5, None, batch.task_ids.cuda(), padding=1, gates=[True] * 5)


def test_a_captured_graph_reads_ids_and_gates_anew() -> None:
    """Nothing waits for the device, which a capture would refuse; the mix is data."""
    batch = linear_batch(BF16, BF16, 3).detached(grad=False)
    ids = batch.task_ids.cuda()
    run(batch, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(batch, ids)
    for order in ([0] * 10, [-1] * 10, IDS, IDS[::-1]):
        ids.copy_(torch.tensor(order))
        for value in (0.05, 0.2):
            score: Any = batch.scores[0]
            score.fill_(value)
            graph.replay()
            assert torch.equal(got, run(batch, ids))


def test_permuted() -> None:
    """A permuted batch gives the permuted bits: a row does not know its neighbours."""
    batch = linear_batch(BF16, F32, 3).detached(grad=False)
    order = torch.randperm(10)
    y = run(batch, batch.task_ids.cuda())
    moved = batch._replace(input=batch.input[order.cuda()])
    assert torch.equal(run(moved, batch.task_ids[order].cuda()), y[order.cuda()])
    assert rms(y) > 0
