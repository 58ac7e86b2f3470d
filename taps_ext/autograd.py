"""Gradients of the custom operators: what forward keeps, what backward gives, and who calls them.

Eager autograd goes through `torch.autograd.Function` (cheaper to call); compiled graphs and direct users of
`torch.ops.taps_ext` get the same backward through `register_autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

_INPUT, _WEIGHT, _DELTA, _SCORE, _BIAS = range(5)  # leading arguments of both forward ops


def _output_mask(need: tuple[bool, ...], gate: bool | None) -> list[bool]:
    """Which of (dinput, ddelta, dscore, dbias, dweight) backward must give, of the inputs that need a gradient (fewer,
    while it runs, where fewer are asked for); a closed Delta rests."""
    return [need[_INPUT], need[_DELTA] and gate is not False, need[_SCORE], need[_BIAS], need[_WEIGHT]]


# Nodes that keep their result for backward, and nodes whose result is another view of their input.
_KEEPERS = ("Relu", "Sigmoid", "Tanh", "Softmax", "ScaledDotProduct")
_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Squeeze", "Unsqueeze", "T")


def _kept_by_its_maker(input: Tensor) -> bool:
    """True where the graph holds this tensor anyway: to keep it costs nothing, and to copy a part of it does."""
    node: Any = None if torch.compiler.is_compiling() else input.grad_fn
    while node is not None:
        kind = type(node).__name__.partition("Backward")[0]
        if kind.startswith(_KEEPERS):
            return True
        node = node.next_functions[0][0] if kind in _VIEWS else None
    return False


def _rows_of(input: Tensor, rows: Tensor, ndim: int) -> Tensor:
    """The samples of an image batch, or the rows of a matrix (the leading dimensions as one)."""
    return (input.reshape(-1, input.shape[-1]) if ndim == 2 else input).index_select(0, rows)


def save(ctx: Any, inputs: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    """Keep what backward reads: the input only if a weight gradient or gate gradient will be asked for.

    `settings`: gate, threshold, rows and their scale.

    Of the input of a layer known to be closed, whose score alone asks for it, only what `rows` picks, unless the graph
    holds it anyway.
    """
    input, weight, delta, score, bias = inputs[:5]
    gate, threshold, rows, scale = settings
    dinput, ddelta, dscore, _, dweight = _output_mask(ctx.needs_input_grad, gate)
    picked = True
    if rows is not None and gate is False and dscore and not dweight:
        picked = not _kept_by_its_maker(input)
        input = _rows_of(input, rows, weight.dim()) if picked else input
    else:
        rows, scale = None, 1.0
    ctx.kept = gate, threshold, scale, picked, None if bias is None else bias.dtype
    ctx.save_for_backward(
        input if ddelta or dscore or dweight else None,
        weight,
        delta if ddelta or dscore or (dinput and gate is not False) else None,
        score if dscore or gate is None else None,
        rows,
    )


def saved(ctx: Any) -> tuple[Any, ...]:
    """What :func:`save` kept: input (what `rows` picks of it), weight, delta, score, rows; gate, threshold, scale; and
    what is asked for."""
    input, weight, delta, score, rows = ctx.saved_tensors
    gate, threshold, scale, picked, _ = ctx.kept
    if not picked:
        input = _rows_of(input, rows, weight.dim())
    return input, weight, delta, score, rows, gate, threshold, scale, _output_mask(ctx.needs_input_grad, gate)


def order(ctx: Any, grads: Any, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Backward results in the order of the forward's arguments; what was not asked for is None."""
    dinput, ddelta, dscore, dbias, dweight = grads
    if mask[3]:
        dbias = dbias.to(ctx.kept[-1])
    return (
        dinput if mask[0] else None,
        dweight if mask[4] else None,
        ddelta if mask[1] else None,
        dscore if mask[2] else None,
        dbias if mask[3] else None,
    )


def differentiable(run: Callable[..., Tensor], setup: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """`run(*inputs)` with a gradient: `setup(ctx, inputs, output)` keeps what `backward(ctx, grad)` reads."""

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = run(*inputs)
        setup(ctx, inputs, output)
        return output

    refusing = torch.autograd.function.once_differentiable(backward)

    def once_only(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        return refusing(ctx, grad_output) if torch.is_grad_enabled() else backward(ctx, grad_output)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_only)}
    kind: Any = type("Gated", (torch.autograd.Function,), methods)
    return kind.apply


def once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Refuse to be differentiated again, which would silently give zeros."""

    def checked(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and grad_output.requires_grad:
            raise RuntimeError("taps_ext: the backward of gated layers cannot be differentiated again")
        return backward(ctx, grad_output)

    return checked


def linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, inputs, inputs[5:9])


def linear_gradients(ctx: Any, grad_output: Tensor, kept: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Of the tensors that a gated linear layer reads. `kept`: :func:`saved`."""
    input, weight, delta, score, rows, gate, threshold, scale, mask = kept
    grads = torch.ops.taps_ext.gated_linear_backward.default(
        grad_output, input, weight, delta, score, gate, threshold, mask, rows, scale
    )
    return order(ctx, grads, mask)


def linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return linear_gradients(ctx, grad_output, saved(ctx)) + (None,) * 5


def keep_geometry(ctx: Any, input: Tensor, geometry: tuple[Any, ...]) -> None:
    ctx.geometry, ctx.input_size = geometry, tuple(input.shape[-2:])


def conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keep_geometry(ctx, inputs[0], inputs[5:9])
    save(ctx, inputs, inputs[9:13])


def conv2d_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Of the tensors that a gated convolution reads."""
    input, weight, delta, score, rows, gate, threshold, scale, mask = saved(ctx)
    grads = torch.ops.taps_ext.gated_conv2d_backward.default(
        grad_output,
        input,
        ctx.input_size,
        weight,
        delta,
        score,
        gate,
        threshold,
        *ctx.geometry,
        mask,
        rows,
        scale,
    )
    return order(ctx, grads, mask)


def conv2d_backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return conv2d_gradients(ctx, grad_output) + (None,) * 9


def effective_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, delta, score, ctx.gate, ctx.threshold = inputs
    ctx.save_for_backward(delta, score)


def effective_weight_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    delta, score = ctx.saved_tensors
    need_weight, need_delta, need_score = ctx.needs_input_grad[:3]
    ddelta = dscore = None
    if need_delta and ctx.gate is not False:
        ddelta = grad.to(delta.dtype)
        if ctx.gate is None:
            ddelta = torch.where(score >= ctx.threshold, ddelta, torch.zeros_like(ddelta))
    if need_score:
        kind = reference.compute_dtype(grad, delta)
        dscore = (grad.to(kind) * delta.to(kind)).sum().to(score.dtype).reshape(score.shape)
        plain = type(grad) is Tensor and not torch.compiler.is_compiling()  # neither fake nor traced
        if grad.device.type == "cpu" and plain:  # elsewhere it would synchronise
            closed = ctx.gate is False or (ctx.gate is None and bool(score < ctx.threshold))
            if closed and not bool(torch.isfinite(dscore)) and not bool(torch.isfinite(delta).all()):
                raise ValueError("delta: expected finite values in a closed layer during training, got Inf or NaN")
    return grad if need_weight else None, ddelta, dscore, None, None
