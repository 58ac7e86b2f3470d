"""Many weights rebuilt by one call: to the bit what one call each gives, and refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taps_ext import ops

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = [F32, F64, BF16, F16]


def entries(count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[bool | None]]:
    """Tensors of every type and of several shapes, dense, with gaps and channels_last, with every kind of gate."""
    torch.manual_seed(0)
    outs, weights, deltas, scores, gates = [], [], [], [], []
    for index in range(count):
        shape = [(3, 5), (40, 130), (6, 4, 3, 3), (0, 4), ()][index % 5]
        weight, delta = torch.randn(shape).to(KINDS[index % 4]), torch.randn(shape)
        if index % 5 == 1:
            weight = torch.randn(40, 133).to(KINDS[index % 4])[:, 1:131]
        if index % 5 == 2:
            weight = weight.to(memory_format=torch.channels_last)
        outs.append(torch.full_like(weight, float("nan"), dtype=KINDS[index // 4 % 4]))
        weights.append(weight)
        deltas.append(delta)
        scores.append(torch.tensor(0.15 if index % 2 else 0.05, dtype=[F32, F64][index % 2]))
        gates.append([True, False, None][index % 3])
    return outs, weights, deltas, scores, gates


def test_equal_to_one_by_one() -> None:
    outs, weights, deltas, scores, gates = entries(97)
    versions = [out._version for out in outs]
    ops.foreach_reconstruct_(outs, weights, deltas, scores, gates=gates)
    for index, out in enumerate(outs):
        want = torch.full_like(out, float("nan"))
        ops.reconstruct_(want, weights[index], deltas[index], scores[index], gate=gates[index])
        assert torch.equal(out, want) and out._version > versions[index], index


def test_defaults_and_nothing_to_do() -> None:
    ops.foreach_reconstruct_([], [], [])
    with pytest.raises(RuntimeError, match="weights: expected 0 entries like outs, got 1"):
        ops.foreach_reconstruct_([], [torch.ones(3)], [])
    out, weight = torch.empty(3), torch.ones(3)
    ops.foreach_reconstruct_([out], [weight], [None], gates=[True])
    assert torch.equal(out, weight)
    ops.foreach_reconstruct_([out], [weight], [weight], [torch.tensor(0.3)], threshold=0.4)
    assert torch.equal(out, weight)
    ops.foreach_reconstruct_([weight, out], [weight, out], [torch.ones(3), torch.ones(3)], gates=[True, False])
    assert weight.tolist() == [2, 2, 2] and out.tolist() == [1, 1, 1]  # an entry may be written in place


def three() -> list[list[Tensor]]:
    return [[torch.full((4, 6), float(10 * kind + i)) for i in range(3)] for kind in range(3)]


def test_refused_before_anything_is_written() -> None:
    outs, weights, deltas = three()
    before = [out.clone() for out in outs]

    def refused(message: str, *, o=outs, w=weights, d=deltas, scores=None, gates=(True,) * 3) -> None:
        with pytest.raises(RuntimeError, match=message):
            ops.foreach_reconstruct_(o, w, d, scores, gates=gates)
        assert all(torch.equal(a, b) for a, b in zip(outs, before, strict=True))

    refused("weights: expected 3 entries like outs, got 2", w=weights[:2])
    refused("deltas: expected 3 entries like outs, got 2", d=deltas[:2])
    refused("scores: expected 3 entries like outs, got 1", scores=[None])
    refused("gates: expected 3 entries like outs, got 1", gates=[True])
    refused(r"item 2: out: expected shape \[4, 6\]", o=[*outs[:2], torch.empty(5)])
    refused("item 1: gate: expected a bool", gates=(True, None, False))
    refused("item 0: delta: expected", d=[torch.ones(4, 7), *deltas[1:]])
    refused("item 1: weight: expected", w=[weights[0], torch.ones(4, 6, dtype=torch.int32), weights[2]])
    shared = torch.zeros(8, 6)
    refused(r"outs\[.\]: expected memory that no other .* some of outs\[.\]'s", o=[shared[:4], outs[1], shared[3:7]])
    gaps = torch.zeros(4, 12)
    refused(r"outs\[.\]: expected memory that no other .* some of outs\[.\]'s", o=[gaps[:, :6], outs[1], gaps[:, :6]])
    taken = "expected memory that no other item writes, got some of"
    refused(rf"weights\[1\]: {taken} outs\[0\]'s", w=[weights[0], outs[0], weights[2]])
    refused(rf"deltas\[0\]: {taken} outs\[2\]'s", d=[outs[2], *deltas[1:]])
    refused(
        "item 1: out: expected memory of its own, or all of weight",
        o=[outs[0], shared[1:5], outs[2]],
        w=[weights[0], shared[:4], weights[2]],
    )
    assert not shared.any() and not gaps.any()


@pytest.mark.parametrize("case", ["ahead", "turned", "another type"])
@pytest.mark.parametrize("operand", ["weight", "delta"])
def test_an_out_in_its_own_operand(case, operand) -> None:
    """Element by element is in place; anything else would read what was written, and torch refuses it too."""
    whole, other = torch.randn(300, 300), torch.randn(300, 300)
    out, taken = {
        "ahead": (whole.flatten()[1:], whole.flatten()[:-1]),
        "turned": (whole.t(), whole),
        "another type": (whole.flatten()[:900], whole.view(BF16).flatten()[:900]),
    }[case]
    other = other.flatten()[: out.numel()].view(out.shape)
    operands = (taken, other) if operand == "weight" else (other, taken)
    before = whole.clone()
    with pytest.raises(RuntimeError, match=f"out: expected memory of its own, or all of {operand} element by element"):
        ops.reconstruct_(out, *operands, gate=True)
    assert torch.equal(whole, before)


def test_types_that_are_none() -> None:
    outs, weights, deltas = three()

    def refused(message: str, *arguments, **settings) -> None:
        with pytest.raises(TypeError, match=message):
            ops.foreach_reconstruct_(*arguments, **{"gates": [True] * 3, **settings})

    refused("weights: expected a list or a tuple, got generator", outs, (w for w in weights), deltas)
    refused("deltas: expected a list or a tuple, got Tensor", outs, weights, torch.stack(deltas))
    refused(r"weights\[1\]: expected a tensor, got NoneType", outs, [weights[0], None, weights[2]], deltas)
    refused(r"deltas\[2\]: expected a tensor, got float", outs, weights, [*deltas[:2], 0.5])
    refused("gates: expected a list or a tuple, got str", outs, weights, deltas, gates="101")
    refused(r"gates\[0\]: expected True, False or None, got 0\.9", outs, weights, deltas, gates=[0.9, True, True])
    with pytest.raises(TypeError, match="gate: expected True, False or None, got 'closed'"):
        ops.reconstruct_(outs[0], weights[0], deltas[0], gate="closed")


def test_gradients_are_not_lost_in_silence() -> None:
    outs, weights, deltas = three()
    for tensors in ((outs, weights, deltas), (weights, outs, deltas), (weights, deltas, outs)):
        tensors[0][1].requires_grad_()
        with pytest.raises(RuntimeError, match="expected tensors without gradients"):
            ops.reconstruct_(outs[1], weights[1], deltas[1], gate=True)
        with pytest.raises(RuntimeError, match=r"outs\[1\]: expected tensors without gradients"):
            ops.foreach_reconstruct_(outs, weights, deltas, gates=[True] * 3)
        with torch.no_grad():
            ops.foreach_reconstruct_(outs, weights, deltas, gates=[True] * 3)
        tensors[0][1].requires_grad_(False)
    with torch.inference_mode():
        out = torch.empty(4, 6)
        ops.reconstruct_(out, weights[0], deltas[0], gate=True)
    with pytest.raises(RuntimeError, match="out: expected a normal tensor outside inference mode"):
        ops.reconstruct_(out, weights[0], deltas[0], gate=True)


@pytest.mark.parametrize("gone", ["out", "weight", "delta"])
def test_memory_that_was_freed(gone) -> None:
    tensors = {name: torch.ones(4, 6) for name in ("out", "weight", "delta")}
    tensors[gone].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{gone}: expected a tensor of shape \[4, 6\] with memory, got .* freed"):
        ops.reconstruct_(tensors["out"], tensors["weight"], tensors["delta"], gate=True)
    tensors = {name: torch.ones(4, 6) for name in ("out", "weight", "delta")}
    tensors[gone].untyped_storage().resize_(95)
    with pytest.raises(RuntimeError, match=rf"{gone}: expected a tensor of shape .* was cut to 95 of 96 bytes"):
        ops.reconstruct_(tensors["out"], tensors["weight"], tensors["delta"], gate=True)


def test_neighbours_in_one_tensor_are_apart() -> None:
    whole = torch.zeros(9, 6)
    _, weights, deltas = three()
    ops.foreach_reconstruct_([whole[:4], whole[4:8]], weights[:2], deltas[:2], gates=[True, True])
    assert torch.equal(whole[:8], torch.cat([weights[0] + deltas[0], weights[1] + deltas[1]])) and not whole[8:].any()


def test_negated_views() -> None:
    """Which torch makes plain for an operator, but not in a list of optional tensors."""
    weight, delta = torch.randn(3, 4), torch.randn(3, 4)
    outs = [torch.empty(3, 4) for _ in range(2)]
    ops.foreach_reconstruct_(outs, [weight, torch._neg_view(weight)], [torch._neg_view(delta), delta], gates=[True] * 2)
    assert torch.equal(outs[0], weight - delta) and torch.equal(outs[1], delta - weight)


def test_opcheck() -> None:
    outs, weights, deltas = three()
    torch.library.opcheck(
        torch.ops.taps_ext.foreach_reconstruct.default, (outs, weights, deltas, [None] * 3, [1, 0, 1], 0.1)
    )
