"""Convolutions of mixed batches: every image by the W_t of its own task, and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import BF16, F32, instructions
from mixed_cases import conv2d_batch, looped
from torch import Tensor

from taps_ext import gated_conv2d, mixed_conv2d, ops, reference

C = ops._C
F64 = torch.float64


def check_draw(seed: int) -> None:
    batch, geometry = conv2d_batch(seed, F64)
    got, want = batch.detached(), batch.detached()
    y, expected = mixed_conv2d(*got[:6], gates=got.gates, **geometry), looped(want, **geometry)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    stock = F.conv2d(got.input, got.weight, got.bias, **geometry)
    assert y.stride() == stock.stride() or y.numel() == 0
    with torch.no_grad():
        torch.testing.assert_close(
            mixed_conv2d(*got[:6], gates=got.gates, **geometry), expected, rtol=1e-10, atol=1e-10
        )
    grad = torch.randn_like(y)
    y.backward(grad)
    if not expected.numel():
        return
    expected.backward(grad)
    for mine, other in zip(got.leaves(), want.leaves(), strict=True):
        if other.grad is None:
            assert mine.grad is None or (mine is got.weight and not mine.grad.any())
        else:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-9)


def test_random_draws_equal_separate_layers() -> None:
    """In float64 sums of some hundreds of products of numbers of size one: 1e-10 is far above their rounding."""
    for seed in range(40):
        check_draw(seed)


@pytest.mark.thorough
def test_many_random_draws_equal_separate_layers() -> None:
    for seed in range(40, 3400):
        check_draw(seed)


def test_random_draws_of_the_reference() -> None:
    for seed in range(20):
        batch, geometry = conv2d_batch(seed, F64)
        x = batch.detached(grad=False)
        y = reference.mixed_conv2d(*x[:6], gates=x.gates, **geometry)
        torch.testing.assert_close(y, looped(x, layer=reference.gated_conv2d, **geometry), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(C is None, reason="no extension")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [F32, BF16], ids=str)
def test_each_task_to_the_bit(kind: torch.dtype, training: bool) -> None:
    """A task's images are one convolution, as they are alone: by the kernels, or on the rebuilt weight."""
    weight, deltas = torch.randn(16, 8, 3, 3).to(kind), [torch.randn(16, 8, 3, 3) for _ in range(3)]
    every, gates = torch.tensor([2, 0, -1, 2, 1, 0]), [True, False, True]
    for isa in C.isas() if not training else C.isas()[:1]:
        for path in (None, "fused", "rebuild") if not training else (None,):
            ids = torch.tensor([2, 0, 2, 0]) if path == "fused" else every  # which no closed layer can be
            x, rows = torch.randn(2 * len(ids), 8, 5, 5).to(kind), ids.repeat_interleave(2)
            for layout in (torch.contiguous_format, torch.channels_last):
                images = x.contiguous(memory_format=layout).requires_grad_(training)
                with instructions(isa), torch.set_grad_enabled(training):
                    C.force_path(path)
                    try:
                        y = mixed_conv2d(images, weight, deltas, None, ids, padding=1, gates=gates)
                        for task in (0, 2):
                            own = images[rows == task].contiguous(memory_format=layout)
                            alone = gated_conv2d(own, weight, deltas[task], padding=1, gate=True)
                            assert torch.equal(y[rows == task], alone), (isa, path, task)
                    finally:
                        C.force_path(None)
                if path == "fused":
                    continue
                base = images[(rows == -1) | (rows == 1)].contiguous(memory_format=layout)
                assert torch.equal(y[(rows == -1) | (rows == 1)], F.conv2d(base, weight, padding=1))


def test_what_gets_a_gradient() -> None:
    """An open task's Delta and score; a closed one's score alone; nothing of an absent task."""
    x, weight, ids = torch.randn(4, 2, 5, 5), torch.randn(4, 2, 3, 3), torch.tensor([0, 1, 0, -1])
    deltas = [torch.randn(4, 2, 3, 3, requires_grad=True) for _ in range(3)]
    scores = [torch.tensor(s, requires_grad=True) for s in (0.5, 0.05, 0.5)]
    mixed_conv2d(x, weight, deltas, scores, ids, gates=[True, False, True]).sum().backward()
    assert [d.grad is not None for d in deltas] == [True, False, False]
    assert [s.grad is not None for s in scores] == [True, True, False]


def test_gradcheck() -> None:
    ids = torch.tensor([1, -1, 0])

    def layer(x: Tensor, w: Tensor, d0: Tensor, d1: Tensor, b: Tensor) -> Tensor:
        return mixed_conv2d(x, w, [d0, d1], None, ids, b, 2, "valid", gates=[True, True])

    shapes = ((3, 2, 4, 5), (2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2), (2,))
    assert torch.autograd.gradcheck(layer, [torch.randn(s, dtype=F64, requires_grad=True) for s in shapes])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_same_padding_and_permutation() -> None:
    x, weight, ids = (
        torch.randn(6, 2, 5, 4, dtype=F64),
        torch.randn(4, 2, 2, 4, dtype=F64),
        torch.tensor([1, 0, -1, 1, 0, 1]),
    )
    deltas, order = [torch.randn(4, 2, 2, 4, dtype=F64) for _ in range(2)], torch.randperm(6)
    y = mixed_conv2d(x, weight, deltas, None, ids, padding="same", gates=[True, True])
    moved = mixed_conv2d(x[order], weight, deltas, None, ids[order], padding="same", gates=[True, True])
    torch.testing.assert_close(y[order], moved, rtol=1e-12, atol=1e-12)
    for sample, task in enumerate(ids.tolist()):
        own = weight if task < 0 else weight + deltas[task]
        torch.testing.assert_close(y[sample], F.conv2d(x[sample], own, padding="same"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"input": torch.randn(2, 5, 5)}, ValueError, r"input: expected \[B, C, H, W\]"),
        ({"weight": torch.randn(4, 2)}, ValueError, r"weight: expected \[O, C / groups, kh, kw\]"),
        ({"input": torch.randn(5, 2, 5, 5)}, ValueError, "input: expected a multiple of the 3 task_ids"),
        ({"deltas": [torch.randn(4, 2, 3, 1)]}, ValueError, r"deltas\[0\]: expected shape"),
        ({"padding": "some"}, (ValueError, RuntimeError), "padding"),
        ({"task_ids": torch.tensor([0, 1, -1])}, (RuntimeError, ValueError), "task_ids.*expected -1 for the base"),
    ],
)
def test_refusals(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "input": torch.randn(3, 2, 5, 5),
        "weight": torch.randn(4, 2, 3, 3),
        "deltas": [torch.randn(4, 2, 3, 3)],
        "scores": None,
        "task_ids": torch.tensor([0, 0, -1]),
        "gates": [True],
    }
    with pytest.raises(error, match=message):
        mixed_conv2d(**{**arguments, **changes})
