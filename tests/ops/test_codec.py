"""Codecs in plain torch: what they keep to the bit, and how far the others are off at most."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import SHAPES, by_the_page, deltas, same_bits
from torch import Tensor

from taps_ext.ops.codec import CODECS, GROUP, Bitmask, Int4, Int8, Sign, pack_bits, unpack_bits

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
SORTS = list(deltas((1, 1)))
every_sort = pytest.mark.parametrize("sort", SORTS)


def matrix(shape: tuple[int, ...], sort: str) -> Tensor:
    delta = deltas(shape)[sort]
    return delta.reshape(shape[0], delta[:1].numel() if shape[0] else 4)


def check(kind: str, tensors: dict[str, Tensor], delta: Tensor) -> Tensor:
    """The decoded Delta: laid out as the layout says, sound, exact, and what the page of the format says."""
    codec = CODECS[kind]
    settings = {"kept": tensors["values"].numel()} if kind == "bitmask" else {}
    layout = codec.layout(*delta.shape, **settings)
    assert {n: (list(t.shape), t.dtype) for n, t in tensors.items()} == {
        n: (list(s), d) for n, (s, d) in layout.items()
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert codec.problem(tensors, *delta.shape) is None
    made = codec.decode(tensors, *delta.shape)
    assert made.shape == delta.shape and made.dtype == torch.float32
    assert np.array_equal(made.double().numpy(), by_the_page(kind, tensors, *delta.shape))
    return made


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 100])
def test_bits_go_from_the_lowest_on(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack_bits(bits)
    assert packed.tolist() == np.packbits(bits.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, count).bool(), bits)


@every_shape
@every_sort
def test_a_bitmask_of_all_loses_nothing(shape: tuple[int, ...], sort: str) -> None:
    """To the bit: negative zeros are kept, positive ones are what is left out."""
    delta = matrix(shape, sort)
    tensors = Bitmask.encode(delta)
    assert same_bits(check("bitmask", tensors, delta), delta)
    assert tensors["values"].numel() == int((delta.view(torch.int32) != 0).sum())


@every_shape
@every_sort
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_bitmask_of_a_share_keeps_the_largest(shape: tuple[int, ...], sort: str, share: float) -> None:
    delta = matrix(shape, sort)
    made = check("bitmask", Bitmask.encode(delta, share), delta)
    kept = made != 0
    count = min(max(1, round(share * delta.numel())), int((delta != 0).sum()))
    assert int(kept.sum()) == count and torch.equal(made[kept], delta[kept])
    left = delta[~kept].abs()
    assert not left.numel() or not count or left.max() <= delta[kept].abs().min()


def test_of_equal_elements_the_first_are_kept() -> None:
    made = Bitmask.decode(Bitmask.encode(torch.tensor([[1.0, 2.0, -1.0, 1.0, 1.0]]), 0.6), 1, 5)
    assert made.tolist() == [[1.0, 2.0, -1.0, 0.0, 0.0]]


@every_shape
@every_sort
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, ...], sort: str) -> None:
    """Without exception: a scale is one up where rounding it left the peak further out; the smallest ones too."""
    delta = matrix(shape, sort)
    tensors = Int8.encode(delta)
    made = check("int8", tensors, delta)
    step = tensors["scale"].double().repeat_interleave(GROUP)[: delta.numel()].view(delta.shape)
    assert ((made.double() - delta.double()).abs() <= step / 2).all()
    peak = delta.double().abs().flatten()
    groups = torch.nn.functional.pad(peak, (0, -len(peak) % GROUP)).view(-1, GROUP).amax(dim=1)
    # A bfloat16 is off by 2^-9 of itself, or by half of the smallest, 2^-134; one up is twice that.
    assert (tensors["scale"].double() <= groups / 127 * (1 + 2.0**-8) + 2.0**-133).all()


@every_shape
@every_sort
def test_int4_is_off_by_half_a_step_or_cuts_off(shape: tuple[int, ...], sort: str) -> None:
    """And all of a group's squared error is no more than that of the scale under which nothing is cut off."""
    delta = matrix(shape, sort)
    tensors = Int4.encode(delta)
    made = check("int4", tensors, delta)
    step = tensors["scale"].double().repeat_interleave(GROUP)[: delta.numel()].view(delta.shape)
    error = (made.double() - delta.double()).abs()
    assert ((error <= step / 2) | (made.double().abs() == 7 * step)).all()
    plain = Uncut.encode(delta)
    assert Uncut.problem(plain, *delta.shape) is None
    without = (Uncut.decode(plain, *delta.shape).double() - delta.double()).abs()
    pad = (0, -delta.numel() % GROUP)
    squares = [torch.nn.functional.pad(e.flatten(), pad).view(-1, GROUP).square().sum(1) for e in (error, without)]
    assert (squares[0] <= squares[1]).all()
    if sort == "plain" and delta.numel() >= 1000:  # cutting off pays for normal values
        assert squares[0].sum() < squares[1].sum()
    full = Uncut.decode(plain, *delta.shape)
    wide = plain["scale"].double().repeat_interleave(GROUP)[: delta.numel()].view(delta.shape)
    assert ((full.double() - delta.double()).abs() <= wide / 2).all()


class Uncut(Int4):
    shrink = (1.0,)


@every_shape
@every_sort
def test_sign_keeps_the_mean_magnitude_of_a_row(shape: tuple[int, ...], sort: str) -> None:
    delta = matrix(shape, sort)
    tensors = Sign.encode(delta)
    made = check("sign", tensors, delta)
    assert torch.equal(made < 0, (delta < 0) & (made != 0))
    if not delta.numel():
        return
    mean, scale = delta.double().abs().mean(dim=1), tensors["scale"].double()
    # Rounded once to float32: to 24 bits, or to a multiple of the smallest.
    assert ((scale - mean).abs() <= mean * 2.0**-24 + 2.0**-150).all()
    lost = (made.double() - delta.double()).square().sum(dim=1)
    # |row|^2 - K m^2 for the mean m exactly, and K (scale - m)^2 more: to the rounding of such sums in float64.
    columns, squares = delta.shape[1], delta.double().square().sum(dim=1)
    want = squares - columns * mean**2 + columns * (scale - mean) ** 2
    assert ((lost - want).abs() <= 8 * columns * 2.0**-53 * squares + 2.0**-298).all()


@pytest.mark.parametrize(("codec", "bytes"), [(Int8, 1 + 2 / 32), (Int4, 0.5 + 2 / 32), (Sign, 1 / 8 + 4 / 64)])
def test_bytes_of_a_weight(codec: type, bytes: float) -> None:
    delta = torch.randn(64, 64)
    assert sum(t.nbytes for t in codec.encode(delta).values()) == bytes * delta.numel()
    assert codec is Sign or bytes / 4 <= {Int8: 0.27, Int4: 0.15}[codec]


def test_what_normal_values_lose() -> None:
    """The errors that docs/packed.md states, to their last digit: of 2^20 values they vary by far less."""
    delta = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    stated = {"int8": 0.5, "int4": 9, "sign": 60, "bitmask": 75}
    for kind, percent in stated.items():
        arguments = (delta, 0.1) if kind == "bitmask" else (delta,)
        made = CODECS[kind].decode(CODECS[kind].encode(*arguments), 1024, 1024)  # type: ignore[attr-defined]
        lost = 100 * float((delta - made).norm() / delta.norm())
        assert round(lost, 1 if percent < 1 else 0) == percent, (kind, lost)


def _on_the_page() -> dict[str, str]:
    """What docs/packed.md says that normal values lose, in percent."""
    text = " ".join((Path(__file__).parents[2] / "docs" / "packed.md").read_text().split())
    found = re.search(
        r"normally distributed int8 loses ([\d.]+) % .*?, int4 ([\d.]+) %, sign ([\d.]+) %, "
        r"and a tenth of the elements ([\d.]+) %",
        text,
    )
    assert found is not None
    return dict(zip(("int8", "int4", "sign", "bitmask"), found.groups(), strict=True))


def test_what_normal_values_lose_in_theory() -> None:
    """The page's figures, from 2^20 values in float64, beside what follows from the normal distribution.

    Lost squares over squares, r2, is a ratio of means over rows that are drawn alike: by the delta method its standard
    error is that of `lost - r2 * squares` over the mean of squares, and no figure may be five of them away from

    - sign: (1 - 2 / pi) (1 - 1 / K), since E|x| = sqrt(2 / pi) and the mean of K magnitudes has a variance;
    - a tenth: 1 - 2 (t phi(t) + 0.05), the second moment beyond t, which a twentieth is beyond on either side;
    - int8: E max^2 / 127^2 / 12, an even error within a step of the largest of 32 by 127. Only the largest itself has
      less, since the scale's rounding (2^-8 at most) moves it by no more than half a step: so 31 / 32 of it at least;
    - int4: at most E max^2 / 7^2 / 12 with the largest itself counted like all others, which the plain scale loses, and
      at least what the best of many scales for each group loses in float64.
    """
    rows, columns = 1024, 1024
    delta = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    squares = delta.double().square().sum(dim=1)
    grid = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    largest = float(torch.trapezoid(2 * grid * (1 - torch.erf(grid / 2**0.5) ** GROUP), grid))  # E max^2
    t = 2**0.5 * float(torch.erfinv(torch.tensor(0.9, dtype=torch.float64)))
    beyond = 2 * (t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) + 0.05)
    groups = delta.double().view(-1, GROUP)
    scale = groups.abs().amax(dim=1, keepdim=True) / 7
    best = torch.full((len(groups),), math.inf, dtype=torch.float64)
    for share in torch.linspace(0.4, 1.02, 125, dtype=torch.float64).tolist():
        step = scale * share
        best = best.minimum((groups - (groups / step).round().clamp(-7, 7) * step).square().sum(dim=1))
    int8, int4 = largest / 127**2 / 12, largest / 7**2 / 12
    wanted = {
        "sign": [(1 - 2 / math.pi) * (1 - 1 / columns)] * 2,
        "bitmask": [1 - beyond] * 2,
        "int8": [int8 * 31 / 32, int8],
        "int4": [float(best.sum() / squares.sum()), int4],
    }
    for kind, (low, high) in wanted.items():
        arguments = (delta, 0.1) if kind == "bitmask" else (delta,)
        made = CODECS[kind].decode(CODECS[kind].encode(*arguments), rows, columns)  # type: ignore[attr-defined]
        lost = (delta.double() - made.double()).square().sum(dim=1)
        found = float(lost.sum() / squares.sum())
        error = float((lost - found * squares).std() / squares.mean()) / rows**0.5
        assert error < 0.01 * found, "the figure means something"
        assert low - 5 * error < found < high + 5 * error, (kind, low, found, high, error)
        stated = _on_the_page()[kind]
        assert f"{100 * found**0.5:.{len(stated.partition('.')[2])}f}" == stated


def test_strides_do_not_matter() -> None:
    delta = torch.randn(40, 64)
    for codec in (Bitmask, Int8, Int4, Sign):
        want = codec.encode(delta)
        got = codec.encode(delta.t().contiguous().t())
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_values_that_no_scale_reaches_are_refused() -> None:
    for codec in (Int8, Int4):
        most = 2.0**120 * codec.most
        codec.encode(torch.tensor([[most, 1.0]]))
        with pytest.raises(ValueError, match="expected values up to"):
            codec.encode(torch.tensor([[-most * 1.01, 1.0]]))


def _change(tensors: dict[str, Tensor], name: str, index: int, value: float) -> dict[str, Tensor]:
    made = {key: tensor.clone() for key, tensor in tensors.items()}
    made[name][index] = value
    return made


@pytest.mark.parametrize(
    ("kind", "name", "index", "value", "message"),
    [
        ("bitmask", "bitmap", 0, 255, "bits, one for each value"),
        ("bitmask", "bitmap", 0, 0, "bits, one for each value"),
        ("bitmask", "bitmap", -1, 0b10000000, "zeros behind the last"),
        ("bitmask", "values", 0, float("nan"), "finite"),
        ("bitmask", "values", 0, float("-inf"), "finite"),
        ("int8", "codes", 3, -128, "codes from -127 to 127, got -128"),
        ("int8", "scale", 0, float("nan"), "scales from 0"),
        ("int8", "scale", 0, float("inf"), "scales from 0"),
        ("int8", "scale", 0, -1.0, "scales from 0 .*got -1"),
        ("int8", "scale", 0, -0.0, "scales from 0"),
        ("int8", "scale", 0, 2.0**121, "scales from 0"),
        ("int4", "codes", 0, 0x08, "codes from -7 to 7, got -8"),
        ("int4", "codes", 0, 0x80, "codes from -7 to 7, got -8"),
        ("int4", "codes", -1, 0x10, "zeros behind the last"),
        ("int4", "scale", 0, float("nan"), "scales from 0"),
        ("sign", "signs", -1, 0b10000000, "zeros behind the last"),
        ("sign", "scale", 0, float("nan"), "scales from 0"),
        ("sign", "scale", 0, -1.0, "scales from 0"),
    ],
)
def test_what_no_encoder_writes_is_named(kind: str, name: str, index: int, value: float, message: str) -> None:
    delta = deltas((3, 5))["sparse"] + torch.eye(3, 5)
    tensors = CODECS[kind].encode(delta)  # type: ignore[attr-defined]
    assert CODECS[kind].problem(tensors, 3, 5) is None
    found = CODECS[kind].problem(_change(tensors, name, index, value), 3, 5)
    assert found is not None and found[0] == name
    assert re.search(message, found[1]), found
