"""The sum that identifies a tensor's bytes and follows a change of some of them, and the digest of a whole state.

    sum(T) = sum over words w of key(w) * word(w)  mod 2^128

where word(w) are the row-major bytes of T, 8 at a time as a little-endian number (zeros behind the last), and key(w) is
the w-th output of splitmix64 at seed 0 (Steele, Lea and Flood, 2014). The sum is linear: a change of some elements adds
the sum of the new ones, alone in their words, and takes away that of the old ones. With keys drawn at random, two
different tensors of one size have one sum with a probability of at most 2^-64, whatever they are: key * difference is
injective in the key, since a difference is below 2^64 and the modulus 2^128. The keys here are public, so the sum finds
accidents (other weights, a patch applied twice or in part, torn writes), and no forgery. What vouches for a patch's own
bytes is SHA-256.

This is plain torch for any device, and what the compiled kernels are compared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

MODULUS = 1 << 128
CHUNK = 1 << 21  # words at a time
UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of a unit's size, as torch can index them."""

_LOW = 0xFFFFFFFF


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Right, with zeros from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def keys(words: Tensor) -> Tensor:
    """key(w) of int64 word numbers, as int64 of the same bits."""
    z = (words + 1) * _STEP
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def products(first: Tensor, second: Tensor) -> int:
    """sum(first * second) mod 2^128 of two int64 vectors that are read as unsigned; at most 2^31 entries."""
    halves = [(values & _LOW, _shifted(values, 32)) for values in (first, second)]
    sums = []
    for a in halves[0]:
        for b in halves[1]:
            product = a * b
            sums += [(product & _LOW).sum(), _shifted(product, 32).sum()]
    total = 0
    for place, number in zip((0, 32, 32, 64, 32, 64, 64, 96), torch.stack(sums).tolist(), strict=True):
        total += number << place
    return total % MODULUS


def sum_of(data: Tensor) -> int:
    """sum(T) of a vector of uint8, on any device."""
    total = 0
    for begin in range(0, data.numel(), 8 * CHUNK):
        piece = data[begin : begin + 8 * CHUNK]
        words = torch.zeros((piece.numel() + 7) // 8, dtype=torch.int64, device=data.device)
        words.view(torch.uint8)[: piece.numel()].copy_(piece)
        numbers = torch.arange(begin // 8, begin // 8 + len(words), device=data.device)
        total += products(keys(numbers), words)
    return total % MODULUS


def sum_at(numbers: Tensor, values: Tensor, unit: int) -> int:
    """What elements alone, at int64 `numbers`, add to a sum; `values` are integers of `unit` bytes."""
    total = 0
    for begin in range(0, numbers.numel(), CHUNK):
        places = numbers[begin : begin + CHUNK] * unit
        wide = values[begin : begin + CHUNK].to(torch.int64)
        if unit < 8:
            wide = wide & ((1 << (8 * unit)) - 1)
        total += products(keys(places >> 3), wide << ((places & 7) * 8))
    return total % MODULUS


def state_digest(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> str:
    """Digest "sha256:<hex>" of a state from its tensors' names, dtypes, shapes and sums."""
    total = hashlib.sha256(b"taps state 1\n")
    for name, dtype, shape, number in sorted(tensors):
        total.update(json.dumps([name, dtype, list(shape), f"{number:032x}"]).encode() + b"\n")
    return "sha256:" + total.hexdigest()
