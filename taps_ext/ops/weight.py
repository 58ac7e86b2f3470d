"""W_t as a tensor of its own, for readers of a weight that no gated layer serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..extension import C
from .lending import like
from .once import once_differentiable
from .reconstruct import reconstruct_


def effective_weight(
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """W_t = round(W + g * Delta) as a new tensor like `weight`, with the gradients of TAPS (equations 2 and 4).

    It costs a weight-sized tensor, kept until backward.
    """
    if C is None or reference.transformed(weight, delta, score):
        return reference.reconstruct(weight, delta, score, gate=gate, threshold=threshold)
    made: Tensor = _Made.apply(weight, delta, score, gate, threshold)
    return made


def unread_weight(
    weight: Tensor,
    delta: Tensor,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """W itself, not W_t, with the gradients of :func:`effective_weight`: for those who never look at its values.

    Where the gate is known to be closed the two are the same, and this one costs no copy.
    """
    if reference.transformed(weight, delta, score):
        return reference.reconstruct(weight, delta, score, gate=gate, threshold=threshold, read=False)
    unread: Tensor = _Unread.apply(weight, delta, score, gate, threshold)
    return unread


def _keep(ctx: Any, delta: Tensor, score: Tensor | None, gate: bool | None, threshold: float) -> None:
    ctx.gate, ctx.threshold = gate, threshold
    ctx.save_for_backward(delta, score)


def plain_gradients(
    grad: Tensor, delta: Tensor, score: Any, gate: bool | None, threshold: float, *, of_delta: bool, of_score: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From G to those of Delta and score, as far as they are asked for, in torch's own operators."""
    ddelta = dscore = None
    if of_delta and gate is not False:
        ddelta = grad.to(delta.dtype)
        if gate is None:
            ddelta = torch.where(score >= threshold, ddelta, torch.zeros_like(ddelta))
    if of_score:
        kind = reference.compute_dtype(grad, delta)
        dscore = (grad.to(kind) * delta.to(kind)).sum().to(score.dtype).reshape(score.shape)
    return ddelta, dscore


def in_batches(gradient: Tensor | None) -> bool:
    """Of `autograd.grad(is_grads_batched=True)`, which the operators know nothing of."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _settled(
    grad: Tensor, delta: Tensor, score: Any, gate: bool | None, threshold: float, *, of_delta: bool, of_score: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same by our operator, which makes no tensor of a weight's size on the way to a score."""
    of_delta = of_delta and gate is not False
    as_it_is = of_delta and gate is True and grad.dtype == delta.dtype
    none = grad.new_empty(0)
    ddelta = torch.empty_like(delta) if of_delta and not as_it_is else none
    dscore = torch.empty_like(score) if of_score else none
    if of_score or (of_delta and not as_it_is):
        lists = [ddelta], [dscore], [grad], [delta], [score], [-1 if gate is None else int(gate)]
        torch.ops.taps_ext.foreach_settle.default(*lists, threshold)
    return (grad if as_it_is else ddelta) if of_delta else None, dscore if of_score else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    delta, score = ctx.saved_tensors
    need_weight, need_delta, need_score = ctx.needs_input_grad[:3]
    known = {"of_delta": need_delta, "of_score": need_score}
    settle = plain_gradients if C is None or reference.may_be_transformed() or in_batches(grad) else _settled
    ddelta, dscore = settle(grad, delta, score, ctx.gate, ctx.threshold, **known)
    if dscore is not None:
        plain = type(grad) is Tensor and not torch.compiler.is_compiling()  # neither fake nor traced
        if grad.device.type == "cpu" and plain:  # elsewhere it would synchronise
            closed = ctx.gate is False or (ctx.gate is None and bool(score < ctx.threshold))
            if closed and not bool(torch.isfinite(dscore)):
                reference.check_closed(delta)
    return grad if need_weight else None, ddelta, dscore, None, None


_once: Any = once_differentiable(_backward)


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, delta: Tensor, score: Tensor | None, gate: bool | None, threshold: float
    ) -> Tensor:
        _keep(ctx, delta, score, gate, threshold)
        return reconstruct_(like(weight), weight, delta, score, gate=gate, threshold=threshold)

    backward = staticmethod(_once)


class _Unread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, delta: Tensor, score: Tensor | None, gate: bool | None, threshold: float
    ) -> Tensor:
        _keep(ctx, delta, score, gate, threshold)
        return weight.view_as(weight)

    backward = staticmethod(_once)
