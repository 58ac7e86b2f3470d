"""States to patch: tensors of every dtype, layout and size with random bits, and others that differ in some."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from taps_ext.store.format import ALL_DTYPES

DTYPES = list(ALL_DTYPES.values())
DENSITIES = (0.0, 0.0003, 0.01, 0.03, 0.1, 0.3, 0.7, 0.97, 1.0)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(flat(a[n]), flat(b[n])) for n in a
    )


def flat(tensor: Tensor) -> Tensor:
    """Row-major bytes as uint8, on the CPU."""
    dense = tensor.detach().cpu().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # sizes of 0 and 1 let it have any strides


def copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in memory of their own, of the same layouts."""
    return {name: laid_out(tensor, tensor.stride()) for name, tensor in state.items()}


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    put(made, flat(tensor))
    return made


def put(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor these row-major bytes."""
    tensor.copy_(data.clone().view(tensor.dtype).reshape(tensor.shape))


def noise(count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    data = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data & 1 if dtype is torch.bool else data


def random_tensor(chance: random.Random, generator: torch.Generator, most: int = 600) -> Tensor:
    """Any dtype, shape (empty and 0-d too) and layout."""
    dtype = chance.choice(DTYPES)
    shape = []
    for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4))):
        shape.append(chance.choice((0, 1, 2, 3, 5, 17, 40, most) if not shape else (1, 2, 3, 5, 7)))
    order = list(range(len(shape)))
    if chance.random() < 0.5:
        chance.shuffle(order)
    step = chance.choice((1, 1, 2, 3))
    strides = [0] * len(shape)
    for dim in order:
        strides[dim] = step
        step *= max(shape[dim], 1)
    tensor = torch.empty_strided(shape, strides, dtype=dtype)
    put(tensor, noise(tensor.numel(), dtype, generator))
    return tensor


def changed(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Another of the same layout, with about this part of the elements drawn anew."""
    data, size = flat(tensor).clone(), tensor.dtype.itemsize
    at = torch.rand(tensor.numel(), generator=generator) < density
    data.view(-1, size)[at] = noise(int(at.sum()), tensor.dtype, generator).view(-1, size)
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    put(made, data)
    return made


def random_pair(seed: int, most: int = 600) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A small state and another one of the same names and forms."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    old = {f"t{i}": random_tensor(chance, generator, most) for i in range(chance.randint(1, 3))}
    return old, {name: changed(tensor, chance.choice(DENSITIES), generator) for name, tensor in old.items()}


def example() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A pair that is the same on every machine: one tensor for each coding, an odd one, a NaN, one that stays."""
    ramp = torch.arange(3000, dtype=torch.int32)
    old = {
        "bit": (ramp[:40] * 7919).to(torch.int16).view(torch.bfloat16),
        "far": torch.zeros(70_000, dtype=torch.uint8),
        "gap": (ramp * 7919).to(torch.int16).view(torch.bfloat16).reshape(30, 100),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(0.0),
        "stays": ramp[:9].reshape(3, 3),
        "truth": ramp[:50] % 3 == 0,
        "wide": torch.complex(ramp[:20].double(), ramp[:20].double()),
    }
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["bit"].view(torch.int16)[::4] += 1
    new["far"][torch.tensor([3, 258, 66_000, 69_999])] = 1
    new["gap"].view(torch.int16).view(-1)[torch.tensor([0, 1, 256, *range(500, 2600, 50), 2854, 2999])] ^= 255
    new["one"] = torch.tensor(-0.0)
    new["truth"][torch.tensor([1, 49])] ^= True
    new["wide"][3] = complex(3, float("nan"))
    return old, new
