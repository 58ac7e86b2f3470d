"""W_t from differentiable torch operations alone: for torch.func's transforms and forward-mode derivatives.

The fused operators know one derivative, backwards. What asks for another (jvp, grad of grad, vmap of either) gets
this form, whose derivatives of every order and mode are torch's own; it costs a weight-sized tensor for each call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import compute_dtype


def may_be_transformed() -> bool:
    """False where :func:`transformed` is, whatever the tensors."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformed(*tensors: Tensor | None) -> bool:
    """True inside a transform of torch.func, or where a tensor carries a forward-mode tangent."""
    if torch.compiler.is_compiling() or not may_be_transformed():  # the operators are in the graph as they are
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def reconstruct(
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None,
    *,
    gate: bool | None,
    threshold: float,
    dtype: torch.dtype | None = None,
    read: bool = True,
) -> Tensor:
    """round(W + g * Delta) in `dtype` (default: the weight's), TAPS equations (2) and (4).

    `score - score.detach()` is zero and has the derivative one: the straight-through gate. A closed Delta that holds
    Inf or NaN does not reach the values (the score's derivative is NaN then, as it should be). With `read=False` the
    values are those of W and the derivatives those of W_t.
    """
    kind = compute_dtype(weight, delta)
    base, change = weight.to(kind), delta.to(kind)
    result = base
    if gate is not False:
        opened = base + (change if read else change - change.detach())
        result = opened if gate or score is None else torch.where(score >= threshold, opened, base)
    if score is not None:
        straight = ((score - score.detach()) * change).to(kind)
        result = result + torch.where(torch.isfinite(change), straight, torch.zeros_like(straight))
    return result.to(weight.dtype if dtype is None else dtype)
