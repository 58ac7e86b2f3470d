"""What fake kernels share: the shapes, types and strides of the custom operators' results, for tracing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false


def empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an operator gives in the place of a result that is not asked for."""
    return like.new_empty([0], dtype=dtype)


def gradient_like(of: Tensor) -> Tensor:
    """Laid out as the operators make it: like a dense tensor, else contiguous."""
    return torch.empty_like(of) if is_non_overlapping_and_dense_or_false(of) else of.new_empty(of.shape)


def gradients(
    dinput: Tensor | None, grad: Tensor, weight: Tensor, delta: Any, score: Any, mask: list[bool]
) -> tuple[Tensor, ...]:
    """The results of a backward operator; one that `mask` does not ask for is empty."""
    return (
        empty(grad) if dinput is None else dinput,
        gradient_like(delta) if mask[1] else empty(grad, (weight if delta is None else delta).dtype),
        torch.empty_like(score) if mask[2] else empty(grad, torch.float32 if score is None else score.dtype),
        grad.new_empty([weight.shape[0]]) if mask[3] else empty(grad),
        gradient_like(weight) if mask[4] else empty(grad, weight.dtype),
    )


def mixed_gradients(
    dinput: Tensor | None,
    grad: Tensor,
    weight: Tensor,
    deltas: list[Any],
    scores: list[Any],
    mask: list[bool],
    delta_mask: list[bool],
    score_mask: list[bool],
) -> tuple[Any, ...]:
    """The results of a mixed batch's backward operator; `mask`: of input, bias and weight."""
    return (
        empty(grad) if dinput is None else dinput,
        grad.new_empty([weight.shape[0]]) if mask[1] else empty(grad),
        gradient_like(weight) if mask[2] else empty(grad, weight.dtype),
        [
            gradient_like(delta) if asked else empty(grad, (weight if delta is None else delta).dtype)
            for delta, asked in zip(deltas, delta_mask, strict=True)
        ],
        [
            torch.empty_like(score) if asked else empty(grad, torch.float32 if score is None else score.dtype)
            for score, asked in zip(scores, score_mask, strict=True)
        ],
    )


def _on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, which first raises RuntimeError for tensors on different devices: meta among others comes here too."""
    names = list(inspect.signature(function).parameters)

    def checked(*args: Any, **kwargs: Any) -> Any:
        named = [*zip(names, args, strict=False), *kwargs.items()]
        flat = [(n, t) for n, v in named for t in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(t, Tensor)]
        for name, tensor in flat:
            if tensor.device != flat[0][1].device:
                first, device = flat[0]
                raise RuntimeError(
                    f"{name}: expected a tensor on {device.device} like {first}, got one on {tensor.device}"
                )
        return function(*args, **kwargs)

    return checked


def register_fake(name: str, function: Callable[..., Any]) -> None:
    """Tell torch about the fake of one operator; the extension must be loaded."""
    torch.library.register_fake(f"taps_ext::{name}", _on_one_device(function))
