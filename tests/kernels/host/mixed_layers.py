"""The operators of mixed batches on the device's kernels, which the twin runs (layers.py): against float64.

Where the grouped kernels are forced, ids on the CPU stand for ids on a device: nobody reads them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from tolerance import assert_close
from torch import Tensor

from taps_ext import mixed_conv2d, mixed_linear, mixed_lowrank, ops, reference

OPS, _C = torch.ops.taps_ext, ops._C
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = [(BF16, BF16, BF16), (BF16, BF16, F32), (F16, F16, F16), (F16, F16, F32)]
# Unsorted with the base and one task absent, all base, one sample, in order.
IDS = [[3, -1, 0, 3, 1, -1, 0, 0, 4, 3], [-1, -1, -1], [1], [0, 0, 1, 3, 4]]
GATES = [None, False, True, True, None]
SCORES = [0.2, 0.2, 0.05, 0.05, 0.05]  # the gate counts where there is one


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


def leaves(tensors: list[Tensor | None], double: bool) -> list[Tensor | None]:
    return [None if t is None else (t.double() if double else t.clone()).requires_grad_() for t in tensors]


def check(
    run: Any,
    exact: Any,
    host: list[Tensor | None],
    weight: Tensor,
    kind: torch.dtype,
    terms: int,
    rows: int,
    inner: int,
) -> Tensor:
    """Forward and backward of run(x, bias, *deltas, *scores) and of the float64 reference; the forward's result."""
    got, want = leaves(host, False), leaves(host, True)
    y, expected = run(*got), exact(*want)
    deltas = [d.double() for d in host[2:] if d is not None and d.dim() > 0]
    wt = weight.double() + max(deltas, key=lambda d: float(d.abs().max()))
    assert y.dtype == kind
    assert_close(y, expected, kind, terms + 1, host[0], wt.abs() + 1)  # type: ignore[arg-type]
    grad = draw(*y.shape, dtype=kind)
    y.backward(grad)
    expected.backward(grad.double())
    for mine, other in zip(got, want, strict=True):
        if mine is None or other is None:
            continue
        if other.grad is None or mine.grad is None:
            assert other.grad is None or not other.grad.any()
            assert mine.grad is None or not mine.grad.any()
            continue
        factors: tuple[Tensor, ...] = (grad, wt.abs() + 1)
        count, outer = max(rows, inner), 1
        if mine.numel() == 1:
            factors, outer = (grad, host[0], wt.abs() + 1), wt.numel()  # type: ignore[assignment]
        elif mine.dim() > 1 and mine.shape == weight.shape:
            factors = (grad, host[0])  # type: ignore[assignment]
        assert_close(mine.grad, other.grad, kind, count, *factors, outer=outer)
    return y


def tasks_of(shape: tuple[int, ...], delta: torch.dtype) -> tuple[list[Tensor | None], list[Tensor]]:
    deltas = [None if task == 2 else draw(*shape, dtype=delta) for task in range(5)]
    return deltas, [torch.tensor(score, dtype=F64 if task % 2 else F32) for task, score in enumerate(SCORES)]


def linear(ids: list[int], per: int, n: int, k: int, kinds: tuple[torch.dtype, ...], gates: list[Any]) -> None:
    kind, of_weight, of_delta = kinds
    at, weight = torch.tensor(ids), draw(n, k, dtype=of_weight)
    deltas, scores = tasks_of((n, k), of_delta)
    host = [draw(len(ids), per, k, dtype=kind), draw(n, dtype=kind), *deltas, *scores]

    def run(x: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return mixed_linear(x, weight, list(rest[:5]), list(rest[5:]), at, bias, gates=gates)

    def exact(x: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return reference.mixed_linear(x, weight.double(), list(rest[:5]), list(rest[5:]), at, bias, gates=gates)

    check(run, exact, host, weight, kind, k, len(ids) * per, n)


def convolution(ids: list[int], images: int, kernel: int, kinds: tuple[torch.dtype, ...]) -> None:
    kind, of_weight, of_delta = kinds
    at, shape = torch.tensor(ids), (12, 16, kernel, kernel)
    weight = draw(*shape, dtype=of_weight)
    deltas, scores = tasks_of(shape, of_delta)
    x = draw(len(ids) * images, 16, 4, 3, dtype=kind).to(memory_format=torch.channels_last)
    host = [x, draw(12, dtype=kind), *deltas, *scores]
    geometry = {"padding": kernel // 2}

    def run(x: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return mixed_conv2d(x, weight, list(rest[:5]), list(rest[5:]), at, bias, **geometry, gates=GATES)

    def exact(x: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        arguments = (weight.double(), list(rest[:5]), list(rest[5:]), at, bias)
        return reference.mixed_conv2d(x, *arguments, **geometry, gates=GATES)

    y = check(run, exact, host, weight, kind, 16 * kernel**2, len(ids) * images * 12, 12 * kernel**2)
    assert y.is_contiguous(memory_format=torch.channels_last)


def lowrank(ids: list[int], per: int, ranks: list[int | None], kind: torch.dtype) -> None:
    at = torch.tensor(ids)
    a = [None if r is None else draw(r, 24, dtype=kind) for r in ranks]
    b = [None if r is None else draw(10, r, dtype=kind) for r in ranks]
    scales, count = [0.5 + task for task in range(len(ranks))], len(ranks)
    host = [draw(len(ids), per, 24, dtype=kind), *a, *b]
    got, want = leaves(host, False), leaves(host, True)
    y = mixed_lowrank(got[0], got[1 : count + 1], got[count + 1 :], at, scales)
    expected = reference.mixed_lowrank(want[0], want[1 : count + 1], want[count + 1 :], at, scales)
    # Two products in turn, each rounded; factors of size one, scales up to so many and a half.
    most, rank = count + 0.5, max(r or 0 for r in ranks)
    one = torch.ones(1, dtype=F64)
    assert_close(y, expected, kind, 24 + rank, most * 24**0.5 * one, one, one)
    grad = draw(*y.shape, dtype=kind)
    y.backward(grad)
    if expected.requires_grad:  # not where all samples are the base's
        expected.backward(grad.double())
    for mine, other in zip(got, want, strict=True):
        if mine is None or other is None or other.grad is None:
            assert mine is None or mine.grad is None or not mine.grad.any()
            continue
        if mine.grad is None:
            assert not other.grad.any()
            continue
        assert_close(mine.grad, other.grad, kind, 24 * len(ids) * per, most * 10**0.5 * one, one, one)


def unknown() -> int:
    """Ids of no task: NaN there, and nowhere else; a task's own NaN stays its own."""
    at = torch.tensor([0, 7, -1, -2, 1, 0])
    weight, bias = draw(8, 16, dtype=BF16), draw(8, dtype=BF16)
    deltas, scores = [draw(8, 16, dtype=F32), torch.full((8, 16), torch.nan)], [None, None]
    x, nan = draw(6, 2, 16, dtype=BF16), torch.tensor([False, True, False, True, True, False])
    factors = [draw(4, 16, dtype=BF16), torch.full((4, 16), torch.nan, dtype=BF16)], [draw(8, 4, dtype=BF16)] * 2
    cases = 0
    for gates in ([1, 1], [0, 0]):
        want = nan & ((at != 1) | (gates[1] == 1))
        y = OPS.mixed_linear(x, weight, deltas, scores, at, bias, gates, 0.1)
        assert torch.equal(y.isnan(), want[:, None, None].expand_as(y))
        if gates[0]:  # a closed convolution refuses to be fused
            images, kernel = x.view(6, 2, 1, 16).permute(0, 3, 1, 2), weight[:, :, None, None]
            kernels = [d[:, :, None, None] for d in deltas]
            z = OPS.mixed_conv2d(images, kernel, kernels, scores, at, bias, [1, 1], [0, 0], [1, 1], 1, gates, 0.1)
            assert torch.equal(z.permute(0, 2, 3, 1).reshape(6, 2, 8).nan_to_num(7), y.nan_to_num(7))
            cases += 1
        asked = [[True, True, False], [True, False], [False, False]]
        grads = OPS.mixed_linear_backward(y, x, weight, deltas, scores, at, gates, 0.1, *asked)
        assert torch.equal(grads[0].isnan(), want[:, None, None].expand_as(x)) and not grads[3][0].isnan().any()
        cases += 2
    low = OPS.mixed_lowrank(x, *factors, at, [1.0, 1.0])
    assert torch.equal(low.isnan(), nan[:, None, None].expand_as(low))
    return cases + 1


def mixed() -> int:
    cases = 0
    _C.force_path("fused")
    for ids, kinds, (per, n, k) in itertools.product(IDS, KINDS, [(1, 40, 64), (3, 33, 70), (1, 5, 7)]):
        if max(ids) >= 0 or n % 2 == 0:  # the base's gradient alone is one layer's, which refuses rows at odd elements
            linear(ids, per, n, k, kinds, GATES)
            cases += 1
    linear(IDS[0], 2, 24, 16, KINDS[1], [False] * 5)  # all closed: the base, and scores
    many = [(i * 37) % 300 - 1 for i in range(40)]  # more tasks than one launch takes
    x, weight, bias = draw(40, 16, dtype=BF16), draw(8, 16, dtype=BF16), draw(8, dtype=BF16)
    deltas = [draw(8, 16, dtype=F32) for _ in range(300)]
    y = OPS.mixed_linear(x, weight, deltas, [None] * 300, torch.tensor(many), bias, [1] * 300, 0.1)
    for row, task in enumerate(many):
        wt = weight.double() + (deltas[task].double() if task >= 0 else 0)
        assert_close(y[row], x[row].double() @ wt.t() + bias.double(), BF16, 17, x, wt)
    for ids, kinds in itertools.product(IDS, KINDS):
        if max(ids) >= 0:
            convolution(ids, 2, 1, kinds)
            cases += 1
    for ids, kind in itertools.product(IDS, (BF16, F32)):
        lowrank(ids, 3, [4, 2, None, 1, 3], kind)
        cases += 1
    cases += unknown() + 2
    _C.force_path("rebuild")  # samples in the order of their tasks, each task's product torch's
    for ids, kinds in itertools.product(IDS, [*KINDS, (F32, F32, F32)]):
        linear(ids, 3, 33, 70, kinds, GATES)
        convolution(ids, 2, 3, kinds)
        convolution(ids, 1, 1, kinds)
        cases += 3
    _C.force_path(None)
    return cases
