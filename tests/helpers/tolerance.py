"""One place where tolerances come from: the rounding of a sum of K products in the compute type.

For y = sum_k x_k w_k with independent rounding errors and root-mean-square magnitudes |x|, |w|:

    operands and result, rounded to the type      eps / 2 * sqrt(3 K) * |x| |w|
    K - 1 additions in order, in the accumulator  eps_acc / 2 * K / sqrt(2) * |x| |w|     (blocked sums: less)

are standard deviations. FACTOR = 6 of them cover the largest of a million elements. A sum of `outer` such y, each
times a further factor, errs by sqrt(outer) times as much. The accumulator is float32, or float64 for float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 6.0


def rms(tensor: Tensor) -> float:
    """Root mean square, 0 for an empty tensor."""
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0


def bound(dtype: torch.dtype, terms: int, *factors: Tensor, outer: int = 1) -> float:
    """Absolute tolerance for sums of `terms` products of elements of `factors`, rounded to `dtype`."""
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    terms = max(terms, 1)
    relative = torch.finfo(dtype).eps / 2 * math.sqrt(3 * terms) + accumulator / 2 * terms / math.sqrt(2)
    return FACTOR * relative * math.sqrt(max(outer, 1)) * math.prod(rms(f) for f in factors)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, terms: int, *factors: Tensor, outer: int = 1) -> None:
    """`got` equals the float64 `want` within :func:`bound`."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    if got.numel():
        error = float((got.detach().double() - want.detach().double()).abs().max())
        limit = bound(dtype, terms, *factors, outer=outer)
        assert error <= limit, f"error {error:.3g} over the bound {limit:.3g}"
