"""The semantics in plain torch: the test oracle, and the path taken where the extension is missing.

    W_t = W + g * Delta,   g = 1[s >= tau]            TAPS (arXiv 2203.16708), equations (2) and (4)

The gate is binary forward and the identity backward (straight-through), so that with G = dL/dW_t

    dL/dDelta = g * G        dL/ds = <G, Delta>        dL/dW = G

A closed gate selects W; Delta is never multiplied, so Inf or NaN in a closed Delta cannot leak.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type in which W + Delta is added: float64 if any operand is, otherwise float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def is_open(score: Tensor | None, gate: bool | None, threshold: float) -> bool:
    """The gate as a host bool: `gate` if given, otherwise `score >= threshold` in the score's type."""
    if gate is not None:
        return gate
    if score is None:
        raise ValueError("score: expected a tensor when gate is None, got None")
    return bool(score >= threshold)


class _Reconstruct(torch.autograd.Function):
    """round(W + g * Delta) with the straight-through gradients above."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        delta: Tensor,
        score: Tensor | None,
        gate: bool | None,
        threshold: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.open = is_open(score, gate, threshold)
        ctx.dtypes = weight.dtype, delta.dtype
        ctx.save_for_backward(delta, score)
        if not ctx.open:
            return weight.to(dtype, copy=True)
        kind = compute_dtype(weight, delta)
        return (weight.to(kind) + delta.to(kind)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad,) = grads
        delta, score = ctx.saved_tensors
        need_weight, need_delta, need_score = ctx.needs_input_grad[:3]
        dweight = grad.to(ctx.dtypes[0]) if need_weight else None
        ddelta = grad.to(ctx.dtypes[1]) if need_delta and ctx.open else None
        dscore = None
        if need_score:
            if not ctx.open and not bool(torch.isfinite(delta).all()):
                raise ValueError("delta: expected finite values in a closed layer during training, got Inf or NaN")
            kind = compute_dtype(grad, delta)
            dscore = (grad.to(kind) * delta.to(kind)).sum().to(score.dtype).reshape(score.shape)
        return dweight, ddelta, dscore, None, None, None


def reconstruct(
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W_t of shape `weight.shape` in `dtype` (default: the weight's own), rounded once."""
    dtype = dtype or weight.dtype
    if delta is None:
        return weight.to(dtype)
    return _Reconstruct.apply(weight, delta, score, gate, threshold, dtype)


def gated_linear(
    input: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """`input [..., K]` times W_t `[N, K]` transposed, plus `bias [N]`: `[..., N]`."""
    weight = reconstruct(weight, delta, score, gate=gate, threshold=threshold, dtype=input.dtype)
    return F.linear(input, weight, None if bias is None else bias.to(input.dtype))


def gated_conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """`input [B, C, H, W]` convolved with W_t `[O, C / groups, kh, kw]`; arguments as `F.conv2d`."""
    weight = reconstruct(weight, delta, score, gate=gate, threshold=threshold, dtype=input.dtype)
    bias = None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def sparsity_loss(scores: Tensor, weights: Tensor, lam: float) -> Tensor:
    """lam / L * sum_i w_i |s_i| over the L learned scores `[L]`; its gradient at 0 is 0."""
    return lam / max(1, scores.numel()) * (weights * scores.abs()).sum()
