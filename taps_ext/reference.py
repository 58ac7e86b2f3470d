"""The semantics in plain torch: the test oracle, the path taken where the extension is missing, and that of
torch.func's transforms and forward-mode derivatives.

    W_t = W + g * Delta,   g = 1[s >= tau]            TAPS (arXiv 2203.16708), equations (2) and (4)

The gate is binary forward and the identity backward (straight-through), so that with G = dL/dW_t

    dL/dDelta = g * G        dL/ds = <G, Delta>        dL/dW = G

A closed gate selects W; Delta is never multiplied, so Inf or NaN in a closed Delta cannot leak. Its score gradient may
be estimated from samples S of the batch B: dL/ds = |B| / |S| * <sum over S of G_b, Delta>, which is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


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


def may_be_transformed() -> bool:
    """False where :func:`transformed` is, whatever the tensors."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transformed(*tensors: Tensor | None) -> bool:
    """True inside a transform of torch.func, or where a tensor carries a forward-mode tangent.

    The operators know one derivative, backwards; who asks for another (jvp, grad of grad, vmap of either) gets what is
    here, at the price of a weight-sized tensor for each call.
    """
    if torch.compiler.is_compiling() or not may_be_transformed():  # the operators are in the graph as they are
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def check_closed(delta: Tensor) -> None:
    """Raise ValueError where the Delta of a closed layer would poison its score: ds = <G, Delta>."""
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("delta: expected finite values in a closed layer during training, got Inf or NaN")


def reconstruct(
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
    dtype: torch.dtype | None = None,
    read: bool = True,
) -> Tensor:
    """W_t of shape `weight.shape` in `dtype` (default: the weight's own), rounded once; differentiable to every order.

    `score - score.detach()` is zero and has the derivative one: the straight-through gate. A closed Delta gets no
    gradient. Inside a transform no value can be looked at: a gate of None is a selection, a closed Delta has a zero
    gradient, and one that holds Inf or NaN does not reach the values.

    Args:
        read: False for the values of W with the derivatives of W_t.

    Raises:
        ValueError: gate and score both None; Inf or NaN in a closed Delta whose score is to have a gradient.
    """
    dtype = dtype or weight.dtype
    if delta is None:
        return weight.to(dtype)
    inside = transformed(weight, delta, score) or torch.compiler.is_compiling()
    if not inside:
        gate = is_open(score, gate, threshold)
    learns = score is not None and (score.requires_grad or inside)
    kind = compute_dtype(weight, delta)
    base, change = weight.to(kind), delta.to(kind)
    if gate is False and not inside:
        change = change.detach()
        if learns and torch.is_grad_enabled():
            check_closed(change)
    result = base
    if gate is not False:
        opened = base + (change if read else change - change.detach())
        result = opened if gate or score is None else torch.where(score >= threshold, opened, base)
    if score is not None and learns:
        straight = ((score - score.detach()) * change).to(kind)
        result = result + torch.where(torch.isfinite(change), straight, torch.zeros_like(straight))
    made = result.to(dtype)
    return made.clone() if made is weight else made


class _Sampled(torch.autograd.Function):
    """A closed layer's output, whose score gradient <G, Delta> is estimated from samples `rows` of the input.

    `layer(input, weight)` is the layer; G = scale * the weight gradient of those samples alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        score: Tensor,
        delta: Tensor,
        input: Tensor,
        weight: Tensor,
        layer: Callable[[Tensor, Tensor], Tensor],
        rows: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(score, delta, input.index_select(0, rows), weight, rows)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        score, delta, taken, weight, rows = ctx.saved_tensors
        check_closed(delta)
        with torch.enable_grad():
            own = weight.detach().to(taken.dtype).requires_grad_()
            output = ctx.layer(taken, own)
        taken_grad = grads[0] if weight.dim() > 2 else grads[0].reshape(-1, grads[0].shape[-1])
        (gradient,) = torch.autograd.grad(output, own, taken_grad.index_select(0, rows))
        kind = compute_dtype(gradient, delta)
        dscore = ctx.scale * (gradient.to(kind) * delta.to(kind)).sum()
        return (grads[0], dscore.to(score.dtype).reshape(score.shape), *[None] * 6)


def _gated(
    layer: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None,
    gate: bool | None,
    threshold: float,
    rows: Tensor | None,
    row_scale: float,
) -> Tensor:
    """`layer(input, W_t)`; with `rows`, the score of a layer known to be closed learns from those samples alone."""
    sampled = rows is not None and gate is False and not weight.requires_grad
    if not sampled or rows is None or delta is None or score is None or not score.requires_grad:
        return layer(input, reconstruct(weight, delta, score, gate=gate, threshold=threshold, dtype=input.dtype))
    output = layer(input, weight.to(input.dtype))
    flat = input.detach() if weight.dim() > 2 else input.detach().reshape(-1, input.shape[-1])
    sampled_output: Tensor = _Sampled.apply(output, score, delta, flat, weight, layer, rows, row_scale)
    return sampled_output


def gated_linear(
    input: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
    rows: Tensor | None = None,
    row_scale: float = 1.0,
) -> Tensor:
    """`input [..., K]` times W_t `[N, K]` transposed, plus `bias [N]`: `[..., N]`."""
    own = None if bias is None else bias.to(input.dtype)
    return _gated(lambda x, w: F.linear(x, w, own), input, weight, delta, score, gate, threshold, rows, row_scale)


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
    rows: Tensor | None = None,
    row_scale: float = 1.0,
) -> Tensor:
    """`input [B, C, H, W]` convolved with W_t `[O, C / groups, kh, kw]`; arguments as `F.conv2d`."""
    own = None if bias is None else bias.to(input.dtype)

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, own, stride, padding, dilation, groups)

    return _gated(layer, input, weight, delta, score, gate, threshold, rows, row_scale)


# ------------------------------------------------------------------------------------------- samples of many tasks


def _mixed(layer: Callable[[Tensor, int], Tensor], input: Tensor, ids: Tensor, tasks: int) -> Tensor:
    """`layer(samples, task)` for the samples of each task, -1 for the base; `input` is [B * k, ...], sample-major.

    Inside a transform no id can be looked at: each task's layer runs on all samples, and its results are selected.
    """
    count = ids.numel()
    per = 1 if count == 0 else input.shape[0] // count
    if count == 0 or input.shape[0] == 0:
        return layer(input, -1)
    if transformed(input, ids) or torch.compiler.is_compiling():
        rows = ids.repeat_interleave(per)
        output = layer(input, -1)
        for task in range(tasks):
            chosen = (rows == task).view(-1, *[1] * (output.dim() - 1))
            output = torch.where(chosen, layer(input, task), output)
        return output
    places, parts = [], []
    for task in range(-1, tasks):
        at = (ids == task).nonzero().flatten()
        if at.numel():
            rows = (at[:, None] * per + torch.arange(per, device=at.device)).flatten()
            places.append(rows)
            parts.append(layer(input.index_select(0, rows), task))
    return torch.cat(parts).index_select(0, torch.cat(places).argsort())


def mixed_linear(
    input: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None,
    task_ids: Tensor,
    bias: Tensor | None = None,
    *,
    gates: Sequence[bool | None] | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """:func:`gated_linear` of each row's own task; arguments as :func:`taps_ext.mixed_linear`."""

    def layer(rows: Tensor, task: int) -> Tensor:
        delta, score, gate = _of_task(deltas, scores, gates, task)
        return gated_linear(rows, weight, delta, score, bias, gate=gate, threshold=threshold)

    output = _mixed(layer, input.reshape(-1, input.shape[-1]), task_ids, len(deltas))
    return output.reshape(*input.shape[:-1], weight.shape[0])


def mixed_conv2d(
    input: Tensor,
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None,
    task_ids: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    gates: Sequence[bool | None] | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """:func:`gated_conv2d` of each image's own task; arguments as :func:`taps_ext.mixed_conv2d`."""

    def layer(images: Tensor, task: int) -> Tensor:
        delta, score, gate = _of_task(deltas, scores, gates, task)
        geometry = (stride, padding, dilation, groups)
        return gated_conv2d(images, weight, delta, score, bias, *geometry, gate=gate, threshold=threshold)

    return _mixed(layer, input, task_ids, len(deltas))


def mixed_lowrank(
    input: Tensor,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    task_ids: Tensor,
    scales: Sequence[float],
) -> Tensor:
    """`scales[t] * (x a[t]^T) b[t]^T` for each row of task t of `input [..., K]`, zeros for the base and for None."""
    outputs = next(up.shape[0] for up in b if up is not None)

    def layer(rows: Tensor, task: int) -> Tensor:
        down, up = (None, None) if task < 0 else (a[task], b[task])
        if down is None or up is None:
            return rows.new_zeros([rows.shape[0], outputs])
        return scales[task] * F.linear(F.linear(rows, down), up)

    output = _mixed(layer, input.reshape(-1, input.shape[-1]), task_ids, len(a))
    return output.reshape(*input.shape[:-1], outputs)


def _of_task(
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None,
    gates: Sequence[bool | None] | None,
    task: int,
) -> tuple[Tensor | None, Tensor | None, bool | None]:
    """Delta, score and gate of a task; of the base, and of a task that is it, none."""
    if task < 0 or deltas[task] is None:
        return None, None, False
    return deltas[task], scores[task] if scores is not None else None, gates[task] if gates is not None else None


def sparsity_loss(scores: Tensor, weights: Tensor, lam: float) -> Tensor:
    """lam / L * sum_i w_i |s_i| over the L learned scores `[L]`; its gradient at 0 is 0."""
    return lam / max(1, scores.numel()) * (weights * scores.abs()).sum()
