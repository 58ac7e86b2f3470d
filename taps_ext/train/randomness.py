"""The random numbers of a run: torch's, NumPy's and Python's generators, seeded, saved and put back together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def forked(device: torch.device | None = None) -> Iterator[None]:
    """Generators of the host, and of `device` if it is a CUDA one, are afterwards as they were before."""
    pythons, numpys = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def seed_host(seed: int) -> None:
    """Start the host's generators from `seed`; those of CUDA devices go on."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_all(seed: int) -> None:
    """Start every generator from `seed`."""
    seed_host(seed)
    torch.manual_seed(seed)


def state() -> dict[str, Tensor]:
    """All generators' states as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    assert version == 3 and kind == "MT19937"
    tensors = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([float("nan") if gauss is None else gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(tensors: Mapping[str, Tensor]) -> None:
    """Put saved states back."""
    gauss, cached = tensors["gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss = tensors["numpy.rest"].tolist()
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
