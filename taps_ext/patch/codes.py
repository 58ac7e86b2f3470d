"""How the numbers of changed elements are written: gaps, or a bit for each element. Plain torch, for any device.

A gap is the distance from the number before (from -1 for the first), at least 1. It is written in codes of 1, 2 or 4
bytes: as often as the gap holds it the largest code, which adds itself and goes on, then what is left, below it.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from ..errors import TapsError
from .sums import UNITS

WIDTHS = {"gap8": 1, "gap16": 2, "gap32": 4, "bitmask": 0}
"""Bytes of a code; 0 for one bit an element, the lowest of a byte first."""


class Fault(enum.IntEnum):
    """What is wrong with an index."""

    NONE = 0
    RANGE = 1
    TWICE = 2
    OPEN = 3
    COUNT = 4


class CodeFault(TapsError):
    """An index that cannot be read: what is wrong, and at which number. Whoever knows the tensor's name catches it."""

    @property
    def fault(self) -> Fault:
        fault: Fault = self.args[0]
        return fault

    @property
    def at(self) -> int:
        return int(self.args[1])


def sizes(gaps: Tensor, units: int) -> dict[str, int]:
    """Bytes of an index of these gaps, by coding."""
    found = {name: int((gaps // _escape(width) + 1).sum()) * width for name, width in WIDTHS.items() if width}
    return {**found, "bitmask": (units + 7) // 8}


def gaps_of(numbers: Tensor) -> Tensor:
    """The gaps of ascending int64 numbers."""
    return torch.diff(numbers, prepend=numbers.new_tensor([-1]))


def encode(numbers: Tensor, width: int, units: int) -> Tensor:
    """Ascending int64 numbers below `units` as bytes."""
    if width == 0:
        bits = torch.zeros((units + 7) // 8 * 8, dtype=torch.uint8, device=numbers.device)
        bits[numbers] = 1
        weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=numbers.device)
        return (bits.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)
    gaps = gaps_of(numbers)
    ends = torch.cumsum(gaps // _escape(width) + 1, 0) - 1
    total = int(ends[-1]) + 1 if len(ends) else 0
    codes = torch.full((total,), _escape(width), dtype=torch.int64, device=numbers.device)
    codes[ends] = gaps % _escape(width)
    return codes.to(UNITS[width]).view(torch.uint8)


def decode(index: Tensor, width: int, units: int, count: int) -> Tensor:
    """The int64 numbers that bytes stand for. Raises CodeFault unless they are `count`, ascending and below `units`."""
    if width == 0:
        bits = (index.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=index.device)) & 1
        numbers = bits.reshape(-1).nonzero().reshape(-1)
    else:
        codes = index.clone().view(UNITS[width]).to(torch.int64) & _escape(width)
        ends = codes != _escape(width)
        if len(codes) and not bool(ends[-1]):
            raise CodeFault(Fault.OPEN, int(codes.sum()) - 1)
        numbers = (torch.cumsum(codes, 0) - 1)[ends]
        twice = gaps_of(numbers) == 0
        if bool(twice.any()):
            at = int(numbers[twice][0])
            raise CodeFault(Fault.RANGE if at < 0 else Fault.TWICE, at)
    if len(numbers) and int(numbers[-1]) >= units:
        raise CodeFault(Fault.RANGE, int(numbers[numbers >= units][0]))
    if len(numbers) != count:
        raise CodeFault(Fault.COUNT, len(numbers))
    return numbers


def _escape(width: int) -> int:
    return (1 << (8 * width)) - 1
