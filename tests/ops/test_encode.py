"""What codecs make of a Delta: the kernels' bits are those of plain torch, under every instruction set."""

from __future__ import annotations

import pytest
import torch
from packed import SHAPES, deltas
from torch import Tensor

from taps_ext import ops
from taps_ext.ops.codec import CODECS
from taps_ext.ops.encode import encoded

C = ops._C
KINDS = list(CODECS)
SHARES = (0.02, 0.1, 0.5, 1.0)
pytestmark = pytest.mark.skipif(C is None, reason="the extension is not built")


def matrix(delta: Tensor) -> Tensor:
    return delta.reshape(len(delta), delta.shape[1:].numel()).contiguous()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    pairs = [(one[name], other[name]) for name in one]
    as_bytes = [(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) for a, b in pairs if a.numel()]
    return one.keys() == other.keys() and all(
        [a.shape == b.shape and a.dtype == b.dtype for a, b in pairs] + [torch.equal(a, b) for a, b in as_bytes]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_plain_torch_to_the_bit(kind: str, isa: str) -> None:
    """Every shape and sort of Delta, of a bitmask every share."""
    for shape in (*SHAPES, (3, 1000), (1024, 7), (2500, 1), (100, 333)):
        for sort, delta in deltas(shape).items():
            for share in (None, *SHARES) if kind == "bitmask" else (None,):
                want = CODECS[kind].encode(matrix(delta), share)
                assert same(encoded(kind, matrix(delta), share), want), (shape, sort, share)


def test_equal_magnitudes_end_in_any_block(isa: str) -> None:
    """A bitmask takes the first of equal ones, wherever the last that it takes is, and both signs are equal."""
    delta = torch.ones(5, 1000)
    delta[1::2, ::3] = -1.0
    delta[3, 500:] = 2.0
    delta[4, 40:60] = 0.0
    for count in (1, 500, 501, 1024, 1025, 2047, 4979, 4980):
        share = count / delta.numel()
        assert same(encoded("bitmask", delta, share), CODECS["bitmask"].encode(delta, share)), count


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str) -> None:
    delta = deltas((400, 1003))["sparse"]
    before, share = torch.get_num_threads(), 0.05 if kind == "bitmask" else None
    try:
        torch.set_num_threads(4)
        many = encoded(kind, delta, share)
        torch.set_num_threads(1)
        assert same(encoded(kind, delta, share), many)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    delta = torch.zeros(3, 40)
    delta[2, 38] = bad
    layout = CODECS[kind].layout(3, 40, kept=1)
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in layout.values()]
    ordered = tensors[::-1] if kind == "sign" else tensors
    with pytest.raises(RuntimeError, match="delta: expected finite values"):
        torch.ops.taps_ext.encode(delta, *ordered, kind)


def test_arguments_that_do_not_fit() -> None:
    delta = torch.randn(4, 32)
    codes, scale = torch.empty(128, dtype=torch.int8), torch.empty(4, dtype=torch.bfloat16)
    bitmap = torch.empty(16, dtype=torch.uint8)
    encode = torch.ops.taps_ext.encode
    for arguments, message in [
        ((delta.double(), codes, scale, "int8"), "delta: expected contiguous float32 on cpu, got float64"),
        ((delta.t(), codes, scale, "int8"), "that is not contiguous"),
        ((delta, codes[:127], scale, "int8"), "codes: expected 128 elements"),
        ((delta, codes, scale[:3], "int8"), "values: expected 4 elements"),
        ((delta, codes, scale, "zip"), "codec: expected bitmask, int8, int4 or sign, got zip"),
        ((delta, delta.view(torch.int8).flatten()[:128], scale, "int8"), "memory of their own"),
        ((delta, bitmap, torch.empty(129), "bitmask"), "or fewer than values"),
        ((torch.zeros(4, 32), bitmap, torch.empty(1), "bitmask"), "or fewer than values"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            encode(*arguments)
    with pytest.raises(ValueError, match=r"expected values up to 9\.3e\+36, got 1e\+38"):
        encoded("int4", torch.full((2, 2), 1e38))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_a_good_citizen(kind: str) -> None:
    delta = torch.randn(8, 40)
    layout = CODECS[kind].layout(8, 40, kept=7)
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in layout.values()]
    ordered = tensors[::-1] if kind == "sign" else tensors
    torch.library.opcheck(torch.ops.taps_ext.encode.default, (delta, *ordered, kind))
