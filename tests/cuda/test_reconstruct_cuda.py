"""W_t as a tensor on a GPU: to the bit the CPU's, one by one and many by one launch."""

from __future__ import annotations

import pytest
import torch
from test_ops_cuda import DTYPES, draw

from taps_ext import ops


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_reconstruct_is_bit_equal_to_the_cpu(out, weight, offset) -> None:
    """All type pairs, aligned and misaligned, tails off the vector width; NaN in a closed Delta is not read."""
    w, d = draw(1031, dtype=weight), draw(1031, dtype=torch.float32)
    for is_open in (True, False):
        delta = d if is_open else torch.full_like(d, float("nan"))
        want = ops.reconstruct_(torch.empty(1031 - offset, dtype=out), w[offset:], delta[offset:], gate=is_open)
        got = torch.full([1031 - offset], float("nan"), dtype=out, device="cuda")
        ops.reconstruct_(got, w.cuda()[offset:], delta.cuda()[offset:], gate=is_open)
        assert torch.equal(got.cpu(), want)
        score = torch.tensor(0.15 if is_open else 0.05, device="cuda")
        ops.reconstruct_(got.fill_(float("nan")), w.cuda()[offset:], delta.cuda()[offset:], score)
        assert torch.equal(got.cpu(), want)


def test_foreach_is_bit_equal_to_one_by_one() -> None:
    """More tensors than a launch takes, of every type and several layouts, some on odd elements, with every gate."""
    lists = ([], [], [], [], [])
    for index in range(90):
        kind = DTYPES[index % 4]
        shape = ((1, 5), (40, 130), (128, 129), (300, 70), (0, 4))[index % 5]
        w, d = draw(*shape, dtype=kind).cuda(), draw(*shape, dtype=torch.float32).cuda()
        if index % 7 == 3:
            w = draw(shape[0], shape[1] + 3, dtype=kind).cuda()[:, 1:-2]
        if index % 7 == 5:
            d = draw(d.numel() + 1, dtype=torch.float32).cuda()[1:].view(shape)
        out = torch.full(shape, float("nan"), dtype=DTYPES[index // 4 % 4], device="cuda")
        score = torch.tensor(0.15 if index % 2 else 0.05, device="cuda")
        for column, entry in zip(lists, (out, w, d, score, (True, False, None)[index % 3]), strict=True):
            column.append(entry)
    outs, weights, deltas, scores, gates = lists
    wanted = []
    for out, weight, delta, score, gate in zip(*lists, strict=True):
        wanted.append(ops.reconstruct_(torch.empty_like(out), weight, delta, score, gate=gate))
    ops.foreach_reconstruct_(outs, weights, deltas, scores, gates=gates)
    assert all(torch.equal(out, want) for out, want in zip(outs, wanted, strict=True))


def test_foreach_takes_few_launches() -> None:
    tensors = [[torch.randn(64, 64, device="cuda") for _ in range(100)] for _ in range(3)]
    ops.foreach_reconstruct_(*tensors, gates=[True] * 100)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        ops.foreach_reconstruct_(*tensors, gates=[True] * 100)
        torch.cuda.synchronize()
    assert len([e for e in record.events() if "foreach_chunks" in e.name]) == 3
