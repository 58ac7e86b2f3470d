"""Linear layers of mixed batches: every row by the W_t of its own task, and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import BF16, F32, instructions
from mixed_cases import Batch, linear_batch, looped
from tolerance import bound, rms
from torch import Tensor

from taps_ext import gated_linear, mixed_linear, ops, reference

C = ops._C
F64 = torch.float64
MIXINGS = [None, "own", "apart"] if C is not None else [None]


@pytest.fixture(params=MIXINGS)
def mixing(request: pytest.FixtureRequest):
    """Each road of choose_mixing() by force, and its own choice."""
    if C is None:
        yield None
        return
    C.force_mixing(request.param)
    yield request.param
    C.force_mixing(None)


def run(batch: Batch) -> Tensor:
    return mixed_linear(*batch[:6], gates=batch.gates)


def expect_equal_gradients(got: Batch, want: Batch, limit: float) -> None:
    """As the loop's: where that asks for none of a task, there is none."""
    for mine, other in zip(got.leaves(), want.leaves(), strict=True):
        if other.grad is None:
            assert mine.grad is None or (mine is got.weight and not mine.grad.any())
            continue
        assert mine.grad is not None and mine.grad.dtype == mine.dtype
        assert (mine.grad.double() - other.grad.double()).abs().max() <= limit


def check_draw(seed: int) -> None:
    batch = linear_batch(seed, F64)
    got, want = batch.detached(), batch.detached()
    y, expected = run(got), looped(want)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(run(got), expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    y.backward(grad)
    if expected.numel():
        expected.backward(grad)
        expect_equal_gradients(got, want, 1e-10 * max(1.0, float(grad.abs().max())) * 100)


def test_random_draws_equal_separate_layers(mixing: str | None) -> None:
    """In float64 sums of at most 510 products of numbers of size one: 1e-10 is five orders above their rounding."""
    for seed in range(40):
        check_draw(seed)


@pytest.mark.thorough
def test_many_random_draws_equal_separate_layers(mixing: str | None) -> None:
    for seed in range(40, 3400):
        check_draw(seed)


def test_random_draws_of_the_reference() -> None:
    for seed in range(25):
        batch = linear_batch(seed, F64)
        got, want = batch.detached(), batch.detached()
        y = reference.mixed_linear(*got[:6], gates=got.gates)
        expected = looped(want, layer=reference.gated_linear)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        if expected.numel():
            y.sum().backward()
            expected.sum().backward()
            expect_equal_gradients(got, want, 1e-8)


@pytest.mark.parametrize("kind, delta_kind", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=str)
def test_random_draws_in_narrow_types(mixing: str | None, kind: torch.dtype, delta_kind: torch.dtype) -> None:
    """Against float64 on the W_t that is rounded once to the compute type, within the bound of its product; by "apart"
    a row is the sum of two products, whose operands are W and Delta, each within its own."""
    for seed in range(100, 130):
        batch = linear_batch(seed, kind, delta_kind)
        exact = batch.detached(grad=False, double=True)
        operands = [exact.weight]
        for task, delta in enumerate(batch.deltas):
            if delta is not None:
                rounded = reference.reconstruct(batch.weight, delta, gate=True, dtype=kind).double()
                exact.deltas[task] = rounded - exact.weight
                operands += [rounded, delta]
        want, largest = looped(exact), max(operands, key=rms)
        limit = 2 * bound(kind, batch.weight.shape[1], batch.input, largest)
        if batch.bias is not None:
            limit += bound(kind, 1, torch.ones(1), want)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = run(batch.detached(grad=grad))
            assert y.dtype == kind and y.shape == want.shape
            if want.numel():
                assert float((y.detach().double() - want).abs().max()) <= limit, seed


@pytest.mark.skipif(C is None, reason="no extension")
@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_each_task_to_the_bit(kind: torch.dtype, training: bool) -> None:
    """A task's rows are one product, as they are alone: few rows by one pass over W, more of them task by task."""
    n, k = 24, 64
    weight, deltas = torch.randn(n, k).to(kind), [torch.randn(n, k) for _ in range(5)]
    bias = torch.randn(n).to(kind)
    every = torch.tensor([3, 0, 3, -1, 1, 1, 3, 4, 2, -1, 0])
    gates = [True, True, False, True, True]
    for isa in C.isas() if not training else C.isas()[:1]:
        for path in (None, "fused", "rebuild") if not training else (None,):
            ids = every[(every >= 0) & (every != 2)] if path == "fused" else every  # which no closed layer can be
            for per in (1, 7, 33):
                x = torch.randn(len(ids), per, k).to(kind).requires_grad_(training)
                with instructions(isa), torch.set_grad_enabled(training):
                    C.force_path(path)
                    C.force_mixing("own")
                    try:
                        y = mixed_linear(x, weight, deltas, None, ids, bias, gates=gates)
                        for task in (0, 1, 3, 4):
                            own = x[ids == task].reshape(-1, k)
                            alone = gated_linear(own, weight, deltas[task], None, bias, gate=True)
                            assert torch.equal(y[ids == task].reshape(-1, n), alone), (isa, path, per, task)
                    finally:
                        C.force_path(None)
                        C.force_mixing(None)
                closed = (ids == -1) | (ids == 2)
                assert torch.equal(y[closed].reshape(-1, n), F.linear(x[closed].reshape(-1, k), weight, bias))


def test_a_batch_of_one_task_is_that_layer_to_the_bit() -> None:
    x, weight, delta, bias = torch.randn(5, 3, 40), torch.randn(20, 40), torch.randn(20, 40), torch.randn(20)
    nan = torch.full((20, 40), torch.nan)
    for ids, gates, want in (
        ([-1] * 5, [True, True], F.linear(x, weight, bias)),
        ([1, -1, 1, 1, -1], [True, False], F.linear(x, weight, bias)),
        ([0] * 5, [True, False], gated_linear(x, weight, delta, None, bias, gate=True)),
    ):
        assert torch.equal(mixed_linear(x, weight, [delta, nan], None, torch.tensor(ids), bias, gates=gates), want)


def test_a_closed_delta_is_not_read(mixing: str | None) -> None:
    x, weight, delta = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6, 8)
    nan, ids = torch.full((6, 8), torch.inf), torch.tensor([0, 1, 0, -1])
    scores = [torch.tensor(0.5), torch.tensor(0.05)]
    for gates in ([True, False], [None, None]):
        x.requires_grad_()
        y = mixed_linear(x, weight, [delta, nan], scores, ids, gates=gates)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.skipif(C is None, reason="no extension")
def test_a_closed_delta_that_would_poison_its_score_raises(mixing: str | None) -> None:
    x, weight, ids = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 1, 0, -1])
    score = torch.tensor(0.05, requires_grad=True)
    deltas = [torch.randn(6, 8), torch.full((6, 8), torch.inf)]
    y = mixed_linear(x, weight, deltas, [None, score], ids, gates=[True, False])
    with pytest.raises(RuntimeError, match="expected finite values in a closed layer"):
        y.sum().backward()


def test_what_gets_a_gradient() -> None:
    """An open task's Delta and score; a closed one's score alone; nothing of an absent task."""
    x, weight, ids = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 1, 0, -1])
    deltas = [torch.randn(6, 8, requires_grad=True) for _ in range(3)]
    scores = [torch.tensor(s, requires_grad=True) for s in (0.5, 0.05, 0.5)]
    mixed_linear(x, weight, deltas, scores, ids, gates=[True, False, True]).sum().backward()
    assert [d.grad is not None for d in deltas] == [True, False, False]
    assert [s.grad is not None for s in scores] == [True, True, False]


def test_gradcheck() -> None:
    ids = torch.tensor([1, -1, 0, 1, 2])

    def layer(x: Tensor, w: Tensor, d0: Tensor, d1: Tensor, b: Tensor) -> Tensor:
        return mixed_linear(x, w, [d0, d1, None], None, ids, b, gates=[True, True, True])

    shapes = ((5, 2, 3), (4, 3), (4, 3), (4, 3), (4,))
    assert torch.autograd.gradcheck(layer, [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes])


def test_permuting_the_batch_permutes_the_output() -> None:
    """And the input's gradient, each to the bit: a row's sums do not depend on where it lies in its task's product."""
    torch.manual_seed(3)
    x, weight = torch.randn(12, 32, dtype=F64), torch.randn(16, 32, dtype=F64)
    deltas, ids = [torch.randn(16, 32, dtype=F64) for _ in range(3)], torch.randint(-1, 3, (12,))
    order = torch.randperm(12)
    found = []
    for rows, of in ((x, ids), (x[order], ids[order])):
        leaf = rows.clone().requires_grad_()
        y = mixed_linear(leaf, weight, deltas, None, of, gates=[True, True, True])
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad))
    for mine, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(mine[order], other, rtol=1e-12, atol=1e-12)


def test_autocast() -> None:
    x, weight, ids = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([0, 1, 0, -1])
    deltas = [torch.randn(6, 8, requires_grad=True) for _ in range(2)]
    with torch.autocast("cpu", BF16):
        y = mixed_linear(x, weight, deltas, None, ids, gates=[True, True])
        want = F.linear(x[[0, 2]], weight + deltas[0])
    assert y.dtype == BF16 and torch.equal(y[[0, 2]], want)
    y.float().sum().backward()
    assert deltas[0].grad.dtype == F32


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"task_ids": torch.tensor([0, 2, 1])}, (RuntimeError, ValueError), "task_ids.*expected -1 for the base"),
        ({"task_ids": torch.tensor([0, -2, 1])}, (RuntimeError, ValueError), "task_ids.*expected -1 for the base"),
        ({"task_ids": torch.tensor([0, 1])}, ValueError, "input: expected a multiple of the 2 task_ids"),
        ({"task_ids": torch.tensor([], dtype=torch.int64)}, ValueError, "input: expected a multiple of the 0"),
        ({"task_ids": torch.tensor([0, 1, 1], dtype=torch.int32)}, ValueError, "task_ids: expected int64"),
        ({"task_ids": [0, 1, 1]}, TypeError, "task_ids: expected a tensor"),
        ({"deltas": torch.randn(2, 4, 8)}, TypeError, "deltas: expected a list"),
        ({"deltas": [torch.randn(4, 7), None]}, ValueError, r"deltas\[0\]: expected shape \[4, 8\]"),
        ({"deltas": [3, None]}, TypeError, r"deltas\[0\]: expected a tensor or None, got int"),
        ({"scores": [torch.zeros(2), None]}, ValueError, r"scores\[0\]: expected one element"),
        ({"scores": [torch.zeros(1)]}, ValueError, "scores: expected 2 entries"),
        ({"gates": [True]}, ValueError, "gates: expected 2 entries"),
        ({"gates": ["open", None]}, TypeError, r"gates\[0\]: expected True, False or None"),
        ({"gates": None, "scores": None}, ValueError, r"scores\[0\]: expected a one-element tensor"),
        ({"input": torch.randn(3, 8, dtype=F64)}, TypeError, "input: expected dtype torch.float32"),
        ({"input": torch.randn(3, 7)}, RuntimeError, None),
        ({"bias": torch.randn(5)}, RuntimeError, None),
    ],
)
def test_refusals(changes: dict, error: type[Exception], message: str | None) -> None:
    arguments = {
        "input": torch.randn(3, 8),
        "weight": torch.randn(4, 8),
        "deltas": [torch.randn(4, 8), torch.randn(4, 8)],
        "scores": [torch.tensor(0.5), torch.tensor(0.5)],
        "task_ids": torch.tensor([0, 1, -1]),
        "gates": [True, None],
    }
    with pytest.raises(error, match=message):
        mixed_linear(**{**arguments, **changes})


@pytest.mark.skipif(C is None, reason="no extension")
def test_the_choice_between_roads() -> None:
    """Evidence "apart" of docs/choose.md."""
    facts = {"addable": True, "fused": False, "outputs": 1024, "inputs": 1024}
    assert [C.choose_mixing(**facts, rows=rows) for rows in (1, 8, 9)] == ["apart", "apart", "own"]
    small = {**facts, "inputs": 256}
    assert [C.choose_mixing(**small, rows=rows) for rows in (1, 2)] == ["apart", "own"]
    assert C.choose_mixing(**{**facts, "fused": True}, rows=1) == "own"
    assert C.choose_mixing(**{**facts, "addable": False}, rows=1) == "own"
    with pytest.raises(RuntimeError, match="mixing: expected own, apart or None"):
        C.force_mixing("stock")


@pytest.mark.skipif(C is None, reason="no extension")
def test_no_weight_is_kept_for_backward() -> None:
    """Law 2: what backward reads are the tensors that came in, and no W_t."""
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(16, 8)
    deltas = [torch.randn(16, 8, requires_grad=True) for _ in range(3)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixed_linear(x, weight, deltas, None, torch.tensor([0, 1, 0, 1, -1, -1]), gates=[True, True, True])
    came = {t.data_ptr() for t in (x, weight, *deltas)}
    assert all(t.data_ptr() in came or t.dtype == torch.int64 for t in kept)
    assert deltas[2].data_ptr() not in {t.data_ptr() for t in kept}  # an absent task's
