"""Codecs: a Delta in fewer bytes, and back, in plain torch on any device. They are the oracle of the kernels.

A Delta `[*W.shape]` is taken as a matrix `[N, K]` (of a convolution `[O, C / groups * kh * kw]`), row-major whatever
the strides of the weight. Bits and nibbles are filled from the lowest on; what is left over in the last byte is zero.
docs/format.md has the layouts. Every decoded value is exact in float32, so that W_t = W + Delta is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

GROUP = 32  # elements of one scale of int8 and int4
LARGEST_SCALE = 2.0**120  # 127 of it are finite in float32
_CHUNK = 1 << 15  # groups that are encoded at a time: float64 of a whole layer is much memory
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's scale, where a few outliers would make all else coarse

Tensors = Mapping[str, Tensor]
Layout = dict[str, tuple[Sequence[int], torch.dtype]]


class Codec:
    """How one kind of packed Delta is laid out.

    Attributes:
        kind: its name in files. settings: names of what its layout depends on beside the shape.
    """

    kind: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def layout(cls, rows: int, columns: int, **settings: Any) -> Layout:
        """Shapes and types of the tensors by name, for a matrix `[rows, columns]`."""
        raise NotImplementedError

    @classmethod
    def encode(cls, delta: Tensor, share: float | None = None) -> dict[str, Tensor]:
        """The tensors of a float32 matrix. `share` is for a bitmask."""
        raise NotImplementedError

    @classmethod
    def decode(cls, tensors: Tensors, rows: int, columns: int) -> Tensor:
        """The Delta, float32 `[rows, columns]`."""
        raise NotImplementedError

    @classmethod
    def problem(cls, tensors: Tensors, rows: int, columns: int) -> tuple[str, str] | None:
        """The name of a tensor that no encoder writes, and what is wrong with it; None where all are sound. Shapes and
        types are those of the layout."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ bits


def pack_bits(bits: Tensor) -> Tensor:
    """Booleans `[n]` as bytes `[ceil(n / 8)]`."""
    whole = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8, device=bits.device)
    whole[: bits.numel()] = bits
    packed, eights = torch.zeros_like(whole[::8]), whole.view(-1, 8)
    for place in range(8):
        packed |= eights[:, place] << place
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits, uint8 `[count]`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> places) & 1).flatten()[:count]


def _padded(packed: Tensor, count: int) -> bool:
    """Whether all bits behind the first `count` are zero."""
    left = count % 8
    return left == 0 or int(packed[-1]) >> left == 0


def _bad_scales(scales: Tensor, largest: float) -> str | None:
    good = torch.isfinite(scales) & (scales >= 0) & ~torch.signbit(scales) & (scales <= largest)
    return None if bool(good.all()) else f"expected scales from 0 to {largest:.6g}, got {scales[~good][0].item():.6g}"


class Bitmask(Codec):
    """Some elements as they are, all others zero: one bit for each element, and float32 values in their order."""

    kind = "bitmask"
    settings = ("kept",)

    @classmethod
    def layout(cls, rows: int, columns: int, **settings: Any) -> Layout:
        return {"bitmap": ([-(-rows * columns // 8)], torch.uint8), "values": ([settings["kept"]], torch.float32)}

    @classmethod
    def encode(cls, delta: Tensor, share: float | None = None) -> dict[str, Tensor]:
        """`share`: of the elements, those of the largest magnitudes, else all but zeros, to the bit (-0.0 is kept)."""
        flat = delta.flatten()
        chosen = flat.view(torch.int32) != 0
        if share is not None:
            chosen = _largest(flat, cls.count(share, flat.numel())) & (flat != 0)
        return {"bitmap": pack_bits(chosen), "values": flat[chosen]}

    @staticmethod
    def count(share: float, numel: int) -> int:
        """Elements that a share of so many is, zeros among them."""
        return max(1, round(share * numel))

    @classmethod
    def decode(cls, tensors: Tensors, rows: int, columns: int) -> Tensor:
        chosen = unpack_bits(tensors["bitmap"], rows * columns).bool()
        values = tensors["values"]
        zeros = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter(chosen, values).view(rows, columns)

    @classmethod
    def problem(cls, tensors: Tensors, rows: int, columns: int) -> tuple[str, str] | None:
        bitmap, values = tensors["bitmap"], tensors["values"]
        if not _padded(bitmap, rows * columns):
            return "bitmap", "expected zeros behind the last element's bit"
        found = int(unpack_bits(bitmap, bitmap.numel() * 8).sum())
        if found != values.numel():
            return "bitmap", f"expected {values.numel()} bits, one for each value, got {found}"
        if not bool(torch.isfinite(values).all()):
            return "values", "expected finite values"
        return None


def _largest(flat: Tensor, count: int) -> Tensor:
    """A mask of the `count` elements of the largest magnitude; of equal ones the first."""
    size = flat.abs()
    if count >= len(flat):
        return torch.ones_like(flat, dtype=torch.bool)
    least = torch.kthvalue(size, len(flat) - count + 1).values
    chosen, equal = size > least, size == least
    return chosen | (equal & (equal.cumsum(0) <= count - chosen.sum()))


class Sign(Codec):
    """`Delta = +-scale` of its row, the mean magnitude there: one bit for each element, set where it is negative.

    What it loses of a row is `|row|^2 - K * scale^2`, squared.
    """

    kind = "sign"

    @classmethod
    def layout(cls, rows: int, columns: int, **settings: Any) -> Layout:
        return {"scale": ([rows], torch.float32), "signs": ([-(-rows * columns // 8)], torch.uint8)}

    @classmethod
    def encode(cls, delta: Tensor, share: float | None = None) -> dict[str, Tensor]:
        sums = torch.zeros(len(delta), 16, dtype=torch.float64, device=delta.device)
        steps = -(-delta.shape[1] // 16)
        whole = torch.nn.functional.pad(delta.abs(), (0, 16 * steps - delta.shape[1]))
        for piece in whole.view(len(delta), steps, 16).unbind(1):
            sums += piece
        scale = _by_halves(sums) / max(1, delta.shape[1])
        return {"scale": scale.float(), "signs": pack_bits(delta.flatten() < 0)}

    @classmethod
    def decode(cls, tensors: Tensors, rows: int, columns: int) -> Tensor:
        negative = unpack_bits(tensors["signs"], rows * columns).view(rows, columns).bool()
        scale = tensors["scale"][:, None].expand(rows, columns)
        return torch.where(negative, -scale, scale)

    @classmethod
    def problem(cls, tensors: Tensors, rows: int, columns: int) -> tuple[str, str] | None:
        if (bad := _bad_scales(tensors["scale"], torch.finfo(torch.float32).max)) is not None:
            return "scale", bad
        return None if _padded(tensors["signs"], rows * columns) else ("signs", "expected zeros behind the last bit")


def _by_halves(values: Tensor) -> Tensor:
    """The sums of the rows of `[n, a power of two]` in one order on every device: each of the first half and its
    partner in the second, until one is left."""
    while values.shape[1] > 1:
        first, second = values.chunk(2, dim=1)
        values = first + second
    return values[:, 0]


# ------------------------------------------------------------------------------------------------ groups


def _scales(wanted: Tensor) -> Tensor:
    """The nearest bfloat16 of float64 scales, whose range is that of float32: of a half small Deltas would be zero."""
    return wanted.to(torch.float32).to(torch.bfloat16)


def _wide_enough(scale: Tensor, peak: Tensor, most: int) -> Tensor:
    """The same, one up where a group's peak would be more than half a step beyond the last code."""
    short = scale.double() * (most + 0.5) < peak
    return (scale.view(torch.int16) + short.to(torch.int16)).view(torch.bfloat16)


def _codes(groups: Tensor, scale: Tensor, most: int) -> Tensor:
    steps = torch.where(scale > 0, 1.0 / scale.double(), 0.0)[:, None]
    return (groups * steps).round().clamp(-most, most)


def _encode_groups(groups: Tensor, most: int, shrink: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Codes (float64) and scales (bfloat16) of float64 groups `[G, 32]`: of these factors of a scale under which the
    peak is the last code, the one of the least squared error."""
    peak = groups.abs().amax(dim=1)
    best = _wide_enough(_scales(peak / most), peak, most)
    codes = _codes(groups, best, most)
    error = _by_halves((groups - codes * best.double()[:, None]).square())
    for factor in shrink[1:]:
        scale = _scales(factor * peak / most)
        tried = _codes(groups, scale, most)
        lost = _by_halves((groups - tried * scale.double()[:, None]).square())
        better = lost < error
        best, error = torch.where(better, scale, best), torch.where(better, lost, error)
        codes = torch.where(better[:, None], tried, codes)
    return codes, best


class Grouped(Codec):
    """`Delta = code * scale`, codes symmetric, a bfloat16 scale for each 32 elements in row-major order (the last group
    may be shorter). An element is off by half a scale at most, but where a scale was chosen under which the largest are
    cut off, which int4 does where all of the group's squared errors are the less for it.
    """

    most: ClassVar[int]
    shrink: ClassVar[Sequence[float]]

    @classmethod
    def check(cls, delta: Tensor) -> None:
        """Raises ValueError for magnitudes that no scale reaches."""
        peak = max(map(abs, map(float, delta.aminmax()))) if delta.numel() else 0.0
        if peak > LARGEST_SCALE * cls.most:
            raise ValueError(f"expected values up to {LARGEST_SCALE * cls.most:.3g}, got {peak:.3g}")

    @classmethod
    def encode(cls, delta: Tensor, share: float | None = None) -> dict[str, Tensor]:
        """Raises ValueError for magnitudes that no scale reaches."""
        cls.check(delta)
        flat = delta.flatten()
        groups = -(-flat.numel() // GROUP)
        codes = torch.zeros(groups * GROUP, dtype=torch.int8, device=delta.device)
        scale = torch.zeros(groups, dtype=torch.bfloat16, device=delta.device)
        for begin in range(0, groups, _CHUNK):
            piece = flat[begin * GROUP : (begin + _CHUNK) * GROUP].double()
            whole = torch.nn.functional.pad(piece, (0, -piece.numel() % GROUP)).view(-1, GROUP)
            made, best = _encode_groups(whole, cls.most, cls.shrink)
            codes[begin * GROUP : (begin + _CHUNK) * GROUP] = made.flatten().to(torch.int8)
            scale[begin : begin + _CHUNK] = best
        return {"codes": cls.narrow(codes[: flat.numel()]), "scale": scale}

    @classmethod
    def decode(cls, tensors: Tensors, rows: int, columns: int) -> Tensor:
        scale = tensors["scale"].float().repeat_interleave(GROUP)[: rows * columns]
        return (cls.wide(tensors["codes"], rows * columns).float() * scale).view(rows, columns)

    @classmethod
    def problem(cls, tensors: Tensors, rows: int, columns: int) -> tuple[str, str] | None:
        codes = cls.wide(tensors["codes"], tensors["codes"].numel() * 2)
        if bool((codes < -cls.most).any()):
            return "codes", f"expected codes from {-cls.most} to {cls.most}, got {int(codes.min())}"
        if bool(codes[rows * columns :].any()):
            return "codes", "expected zeros behind the last code"
        bad = _bad_scales(tensors["scale"], LARGEST_SCALE)
        return None if bad is None else ("scale", bad)

    @staticmethod
    def narrow(codes: Tensor) -> Tensor:
        """int8 codes as they are stored."""
        raise NotImplementedError

    @staticmethod
    def wide(codes: Tensor, count: int) -> Tensor:
        """The first `count` of stored codes, or all, as int8."""
        raise NotImplementedError


class Int8(Grouped):
    """Codes of 8 bits: 1.0625 bytes a weight."""

    kind = "int8"
    most, shrink = 127, (1.0,)

    @classmethod
    def layout(cls, rows: int, columns: int, **settings: Any) -> Layout:
        count = rows * columns
        return {"codes": ([count], torch.int8), "scale": ([-(-count // GROUP)], torch.bfloat16)}

    @staticmethod
    def narrow(codes: Tensor) -> Tensor:
        return codes

    @staticmethod
    def wide(codes: Tensor, count: int) -> Tensor:
        return codes[:count]


class Int4(Grouped):
    """Codes of 4 bits, two's complement, the first of a byte in its lower half: 0.5625 bytes a weight."""

    kind = "int4"
    most, shrink = 7, _SHRINK

    @classmethod
    def layout(cls, rows: int, columns: int, **settings: Any) -> Layout:
        count = rows * columns
        return {"codes": ([-(-count // 2)], torch.uint8), "scale": ([-(-count // GROUP)], torch.bfloat16)}

    @staticmethod
    def narrow(codes: Tensor) -> Tensor:
        pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(torch.uint8).view(-1, 2) & 15
        return pairs[:, 0] | (pairs[:, 1] << 4)

    @staticmethod
    def wide(codes: Tensor, count: int) -> Tensor:
        pairs = torch.stack([codes & 15, codes >> 4], dim=1).flatten()[:count]
        return (pairs.to(torch.int8) ^ 8) - 8


CODECS: dict[str, type[Codec]] = {codec.kind: codec for codec in (Bitmask, Int8, Int4, Sign)}
"""The codecs whose changes have kernels of their own, by name."""
