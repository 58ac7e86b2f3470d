"""Machine: what a device can do at best, measured: the roofs that layers are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """`bandwidth`: bytes a second that a copy reads and writes. `rate`: operations a second of a matrix product."""

    bandwidth: float
    rate: float

    def seconds(self, operations: float, moved: float) -> float:
        """The least time for that much work and traffic: the roofline's."""
        return max(operations / self.rate, moved / self.bandwidth)


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of repeated runs: what the machine does when nothing disturbs it."""
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def measure(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, seconds: float = 0.5) -> Machine:
    """Measure a device, `seconds` for each roof. The copy is far larger than any cache, the product fits it well."""
    device = torch.device(device)
    large = device.type == "cuda"
    source = torch.empty(2**28 if large else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(2)
    copy = _best(lambda: target.copy_(source), device, seconds)
    n = 8192 if large else 1536
    a, b = (torch.full((n, n), value, dtype=dtype, device=device) for value in (0.5, 0.25))  # draws no random numbers
    out = torch.empty(n, n, dtype=dtype, device=device)
    torch.mm(a, b, out=out)
    product = _best(lambda: torch.mm(a, b, out=out), device, seconds)
    return Machine(bandwidth=2 * source.nbytes / copy, rate=2 * n**3 / product)
