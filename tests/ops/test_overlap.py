"""Writing into a tensor that may share memory with what is read: refused where their ranges of bytes meet."""

import random
from math import prod

import pytest
import torch
from torch import Tensor

from taps_ext import ops

pytestmark = pytest.mark.skipif(not ops.HAS_EXTENSION, reason="the compiled extension is not built")


def view(memory: Tensor, chance: random.Random, shape: list[int], apart: bool) -> Tensor:
    """Somewhere in the memory; `apart`: no two elements in one place."""
    while True:
        strides = [chance.choice([1, 1, 2, 3, 4, 7, 12, 16, *([] if apart else [0])]) for _ in shape]
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if last >= memory.numel():
            continue
        result = memory.as_strided(shape, strides, chance.randrange(memory.numel() - last))
        nested, reached = True, 1
        for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
            nested, reached = nested and stride >= reached, size * stride
        if nested or not apart:
            return result


def reach(tensor: Tensor) -> range:
    """The bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def meet(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


def same(a: Tensor, b: Tensor) -> bool:
    strides = [(s, t) for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1]
    return a.data_ptr() == b.data_ptr() and all(s == t for s, t in strides)


def test_every_pair_of_strides() -> None:
    chance, refused, taken = random.Random(0), 0, 0
    for _ in range(3000):
        memory = torch.randn(chance.choice([70, 150]))
        shape = [chance.randrange(0 if chance.random() < 0.05 else 1, 5) for _ in range(chance.randrange(1, 4))]
        out, weight = view(memory, chance, shape, True), view(memory, chance, shape, False)
        delta, before = torch.randn(shape), memory.clone()
        want = weight + delta
        if meet(reach(out), reach(weight)) and not same(out, weight):
            with pytest.raises(RuntimeError, match="out: expected memory of its own, or all of weight"):
                ops.reconstruct_(out, weight, delta, gate=True)
            assert torch.equal(memory, before)
            refused += 1
        else:
            assert torch.equal(ops.reconstruct_(out, weight, delta, gate=True), want), (out.stride(), weight.stride())
            taken += prod(shape) > 0
    assert refused > 500 and taken > 500


def test_outs_of_one_matrix() -> None:
    """Its rows are apart, as parts that are fused into one weight are; its columns lie between each other's."""
    memory = torch.zeros(6, 9)
    weights, deltas = [torch.full((2, 9), float(i)) for i in range(3)], [torch.ones(2, 9)] * 3
    ops.foreach_reconstruct_(list(memory.split(2)), weights, deltas, gates=[True] * 3)
    assert torch.equal(memory, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(2)[:, None].expand(6, 9))
    weights, deltas = [torch.ones(6, 3)] * 2, [torch.ones(6, 3)] * 2
    for columns in ((0, 3), (3, 0), (0, 2)):
        outs = [memory[:, first : first + 3] for first in columns]
        with pytest.raises(RuntimeError, match=r"outs\[\d\]: expected memory that no other item writes"):
            ops.foreach_reconstruct_(outs, weights, deltas, gates=[True] * 2)
    with pytest.raises(RuntimeError, match=r"deltas\[1\]: expected memory that no other item writes, .* outs\[0\]'s"):
        ops.foreach_reconstruct_(
            [memory[:, :3], torch.empty(6, 3)], weights, [deltas[0], memory[:, 5:8]], gates=[True] * 2
        )


def test_an_operand_over_many_outs() -> None:
    """It meets one that is not the last, or holds only its own."""
    memory, weight = torch.zeros(8, 4), torch.ones(2, 4)
    outs = [memory[2:4], memory[6:8]]
    with pytest.raises(RuntimeError, match=r"weights\[1\]: expected memory that no other item writes, .* outs\[0\]'s"):
        ops.foreach_reconstruct_(outs, [weight, memory[3:5]], [weight] * 2, gates=[True] * 2)
    ops.foreach_reconstruct_(outs, [weight, memory[6:8]], [weight] * 2, gates=[True] * 2)
    assert memory[2:4].eq(2).all() and memory[6:8].eq(1).all() and not memory[[0, 1, 4, 5]].any()


def test_bytes_of_another_type() -> None:
    memory = torch.zeros(8)
    halves = memory.view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="out: expected memory of its own"):
        ops.reconstruct_(memory[1:3], halves[3:5], torch.zeros(2), gate=True)
    ops.reconstruct_(memory[1:3], halves[0:2], torch.ones(2), gate=True)
    assert memory.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
