"""W_t of a packed Delta: the kernels' bits are those of plain torch, and nothing is read that is not there."""

from __future__ import annotations

import pytest
import torch
from fused import instructions
from packed import SHAPES, deltas
from torch import Tensor

from taps_ext import ops
from taps_ext.ops import unpack
from taps_ext.ops.codec import CODECS

C = ops._C
ISAS = [None] if C is None else C.build_info()["isas"]
KINDS = list(CODECS)
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
extension = pytest.mark.skipif(C is None, reason="the extension is not built")


def packed(kind: str, delta: Tensor) -> dict[str, Tensor]:
    matrix = delta.reshape(len(delta), delta.shape[1:].numel())
    return CODECS[kind].encode(matrix)  # type: ignore[attr-defined]


def plain(weight: Tensor, kind: str, tensors: dict[str, Tensor]) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = CODECS[kind].decode(tensors, len(weight), weight.shape[1:].numel()).view(weight.shape)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def equal(one: Tensor, other: Tensor) -> bool:
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(size), other.contiguous().view(size))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_plain_torch_to_the_bit(kind: str, isa: str | None) -> None:
    """Every shape, sort of Delta, type and layout of the weight."""
    if isa is not None and isa not in C.isas():
        pytest.skip(f"this machine does not run {isa}")
    with instructions(isa):
        for shape in (*SHAPES, (3, 1000), (1024, 7), (2500, 1)):
            for sort, delta in deltas(shape).items():
                tensors = packed(kind, delta)
                for dtype in TYPES:
                    weight = (delta * 3 + 1e-3).to(dtype)
                    for laid in _layouts(weight):
                        got = unpack.packed_weight(laid, kind, tensors)
                        want = plain(laid, kind, tensors)
                        assert equal(got, want), (shape, sort, dtype)
                        assert got.stride() == torch.empty_like(laid).stride()


def _layouts(weight: Tensor) -> list[Tensor]:
    others = [weight.t().contiguous().t()] if weight.dim() == 2 else [weight.to(memory_format=torch.channels_last)]
    wide = torch.zeros(*weight.shape[:-1], weight.shape[-1] + 3, dtype=weight.dtype)
    wide[..., 1:-2] = weight
    return [weight, *others, wide[..., 1:-2]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_delta_alone_is_the_codecs_to_the_bit(kind: str) -> None:
    """The signs of zeros too."""
    for shape in SHAPES:
        for delta in deltas(shape).values():
            tensors = packed(kind, delta)
            want = CODECS[kind].decode(tensors, len(delta), delta.shape[1:].numel()).reshape(shape)
            assert equal(unpack.unpacked(kind, tensors, shape), want)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str) -> None:
    weight, delta = torch.randn(400, 1003), deltas((400, 1003))["sparse"]
    tensors = packed(kind, delta)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        got = unpack.packed_weight(weight, kind, tensors)
    finally:
        torch.set_num_threads(before)
    assert equal(got, plain(weight, kind, tensors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("score", "open"), [(0.15, True), (0.1, True), (0.05, False)])
def test_a_gate_that_the_device_knows(kind: str, score: float, open: bool) -> None:
    weight, delta = torch.randn(20, 33), deltas((20, 33))["plain"]
    tensors = packed(kind, delta)
    got = unpack.packed_weight(weight, kind, tensors, torch.tensor(score), gate=None)
    assert equal(got, plain(weight, kind, tensors) if open else weight)
    closed = unpack.packed_weight(weight, kind, tensors, gate=False)
    assert equal(closed, weight) and closed.data_ptr() != weight.data_ptr()
    for given in (weight, weight.clone().requires_grad_()):  # by the kernel, and without it
        with pytest.raises(RuntimeError, match="gate: expected a bool, or a score"):
            unpack.packed_weight(given, kind, tensors, gate=None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_trains_gets_its_gradient(kind: str) -> None:
    weight, delta = torch.randn(6, 9, requires_grad=True), deltas((6, 9))["plain"]
    tensors, factor = packed(kind, delta), torch.randn(6, 9)
    made = unpack.packed_weight(weight, kind, tensors)
    assert equal(made.detach(), plain(weight.detach(), kind, tensors))
    (made * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


@extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [True, None])
def test_opcheck(kind: str, gate: bool | None) -> None:
    weight, tensors = torch.randn(5, 40), packed(kind, deltas((5, 40))["plain"])
    first, second = (tensors[name] for name in unpack.ORDER[kind])
    arguments = (torch.empty(5, 40), weight, first, second, kind, torch.tensor(0.15), gate, 0.1)
    torch.library.opcheck(torch.ops.taps_ext.unpack.default, arguments)


def arguments(kind: str, **changes) -> tuple:
    weight, tensors = torch.randn(5, 41), packed(kind, deltas((5, 41))["plain"])
    first, second = (tensors[name] for name in unpack.ORDER[kind])
    given = {"out": torch.zeros(5, 41), "weight": weight, "codes": first, "values": second, "codec": kind}
    given |= {"score": None, "gate": True, "threshold": 0.1}
    made = {**given, **{name: change(given) for name, change in changes.items()}}
    return tuple(made.values())


@extension
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_before_anything_is_written(kind: str) -> None:
    cases = {
        "codes: expected .* elements for this weight": {"codes": lambda g: g["codes"][:-1].clone()},
        "codes: expected .* next to each other": {"codes": lambda g: g["codes"].repeat_interleave(2)[::2]},
        "codes: expected .*int8 next": {"codes": lambda g: g["codes"].to(torch.int16)},
        "codes: expected .* in one dimension": {"codes": lambda g: g["codes"][None]},
        "values: expected .* next": {"values": lambda g: g["values"].double()},
        "out: expected shape": {"out": lambda g: torch.zeros(41, 5)},
        "out: expected memory of its own": {"out": lambda g: g["weight"]},
        "out: expected distinct memory": {"out": lambda g: torch.zeros(1, 41).expand(5, 41)},
        "codec: expected bitmask, int8, int4 or sign": {"codec": lambda g: "int2"},
        "gate: expected a bool, or a score": {"gate": lambda g: None},
        "threshold: expected a number": {
            "gate": lambda g: None,
            "score": lambda g: torch.tensor(0.1),
            "threshold": lambda g: float("nan"),
        },
    }
    counted = "one for each value" if kind == "bitmask" else "values: expected .* elements for this weight"
    cases[counted] = {"values": lambda g: g["values"][:-1].clone()}
    for message, changes in cases.items():
        given = arguments(kind, **changes)
        before = given[0].clone()
        with pytest.raises(RuntimeError, match=message):
            torch.ops.taps_ext.unpack(*given)
        assert torch.equal(given[0], before), message


@extension
def test_a_bitmap_that_asks_for_more_values_is_refused() -> None:
    """Also by the bits behind the last element."""
    for where, bits in ((0, 255), (-1, 0b10000000)):
        given = list(arguments("bitmask"))
        given[2] = given[2].clone()
        given[2][0] = 0
        given[3] = given[3][8:].clone()
        torch.ops.taps_ext.unpack(*given)
        given[2][where] = bits
        with pytest.raises(RuntimeError, match="codes: expected .* bits, one for each value, got"):
            torch.ops.taps_ext.unpack(*given)
