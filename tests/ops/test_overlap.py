"""Writing into a tensor that shares memory with what is read: refused exactly where a byte is shared."""

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


def places(tensor: Tensor) -> set[int]:
    if tensor.numel() == 0:
        return set()
    start, size = tensor.data_ptr(), tensor.element_size()
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for dim, (count, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        offsets += (torch.arange(count) * stride).reshape([-1 if i == dim else 1 for i in range(tensor.dim())])
    return {start + size * offset + byte for offset in offsets.flatten().tolist() for byte in range(size)}


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
        if places(out) & places(weight) and not same(out, weight):
            with pytest.raises(RuntimeError, match="out: expected memory of its own, or all of weight"):
                ops.reconstruct_(out, weight, delta, gate=True)
            assert torch.equal(memory, before)
            refused += 1
        else:
            assert torch.equal(ops.reconstruct_(out, weight, delta, gate=True), want), (out.stride(), weight.stride())
            taken += prod(shape) > 0
    assert refused > 500 and taken > 500


def test_outs_of_one_matrix() -> None:
    """Its columns are apart, as parts that are fused into one weight are; columns that overlap are not."""
    memory = torch.zeros(6, 9)
    weights, deltas = [torch.full((6, 3), float(i)) for i in range(3)], [torch.ones(6, 3)] * 3
    ops.foreach_reconstruct_(list(memory.split(3, 1)), weights, deltas, gates=[True] * 3)
    assert torch.equal(memory, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(3).expand(6, 9))
    with pytest.raises(RuntimeError, match=r"outs\[\d\]: expected memory that no other item writes"):
        ops.foreach_reconstruct_([memory[:, :3], memory[:, 2:5]], weights[:2], deltas[:2], gates=[True] * 2)
    with pytest.raises(RuntimeError, match=r"deltas\[1\]: expected memory that no other item writes, .* outs\[0\]'s"):
        ops.foreach_reconstruct_(
            [memory[:, :3], torch.empty(6, 3)], weights[:2], [deltas[0], memory[:, 1:4]], gates=[True] * 2
        )


def test_bytes_of_another_type() -> None:
    memory = torch.zeros(8)
    halves = memory.view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="out: expected memory of its own"):
        ops.reconstruct_(memory[1:3], halves[3:5], torch.zeros(2), gate=True)
    ops.reconstruct_(memory[1:3], halves[0:2], torch.ones(2), gate=True)
    assert memory.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
