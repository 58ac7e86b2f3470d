"""Packed Deltas as docs/format.md says, in NumPy and one element at a time where that is plainer: the second reader."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def _bits(packed: Tensor, count: int) -> np.ndarray:
    return np.unpackbits(packed.numpy(), bitorder="little")[:count]


def by_the_page(kind: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> np.ndarray:
    """The Delta, float64 `[rows, columns]`."""
    count = rows * columns
    if kind == "lowrank":
        return tensors["up"].double().numpy() @ tensors["down"].double().numpy()
    if kind == "bitmask":
        delta = np.zeros(count)
        delta[_bits(tensors["bitmap"], count) == 1] = tensors["values"].double().numpy()
    elif kind == "sign":
        scale = np.repeat(tensors["scale"].double().numpy(), columns)
        delta = np.where(_bits(tensors["signs"], count) == 1, -scale, scale)
    else:
        if kind == "int8":
            codes = tensors["codes"].numpy().astype(np.int64)
        else:
            nibbles = [n for byte in tensors["codes"].tolist() for n in (byte % 16, byte // 16)]
            codes = np.array([n - 16 if n > 7 else n for n in nibbles[:count]], dtype=np.int64)
        delta = codes * np.repeat(tensors["scale"].double().numpy(), 32)[:count]
    return delta.reshape(rows, columns)


SHAPES = [(1, 1), (3, 5), (1, 8), (8, 1), (7, 9), (4, 32), (5, 64), (33, 31), (6, 4, 3, 3), (40, 130), (0, 4), (4, 0)]


def deltas(shape: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """Deltas of every sort that a codec must take."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=generator) * 1e-3
    sparse = torch.where(torch.rand(shape, generator=generator) < 0.2, plain, torch.zeros(()))
    wild = plain * 10.0 ** torch.randint(-30, 30, shape, generator=generator)
    tiny = plain.sign() * 2.0**-149 * torch.randint(0, 1 << 12, shape, generator=generator)
    signed = torch.where(torch.rand(shape, generator=generator) < 0.3, torch.tensor(-0.0), sparse)
    return {
        "plain": plain,
        "sparse": sparse,
        "wild": wild,
        "tiny": tiny,
        "signed zeros": signed,
        "zero": torch.zeros(shape),
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, the signs of zeros too."""
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.int32), other.contiguous().view(torch.int32)
    )
