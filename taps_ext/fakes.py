"""Fake kernels: the shapes, types and strides of the custom operators' results, for tracing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty([0], dtype=dtype)


def _fake_linear(
    input: Tensor,
    weight: Tensor,
    delta: Any,
    score: Any,
    bias: Any,
    gate: Any,
    threshold: float,
    rows: Any = None,
    row_scale: float = 1.0,
    training: bool = False,
) -> Tensor:
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: (
            f"input: expected shape [..., {weight.shape[1]}] for a weight of shape {list(weight.shape)}, got "
            f"{list(input.shape)}"
        ),
    )
    return input.new_empty([*input.shape[:-1], weight.shape[0]])


def _gradient(of: Tensor) -> Tensor:
    """Laid out as the operators make it: like a dense tensor, else contiguous."""
    return torch.empty_like(of) if is_non_overlapping_and_dense_or_false(of) else of.new_empty(of.shape)


def _fake_backward(
    dinput: Tensor | None, grad: Tensor, weight: Tensor, delta: Any, score: Any, mask: list[bool]
) -> tuple[Tensor, ...]:
    return (
        _empty(grad) if dinput is None else dinput,
        _gradient(delta) if mask[1] else _empty(grad, (weight if delta is None else delta).dtype),
        torch.empty_like(score) if mask[2] else _empty(grad, torch.float32 if score is None else score.dtype),
        grad.new_empty([weight.shape[0]]) if mask[3] else _empty(grad),
        _gradient(weight) if mask[4] else _empty(grad, weight.dtype),
    )


def _fake_linear_backward(
    grad_output: Tensor,
    input: Any,
    weight: Tensor,
    delta: Any,
    score: Any,
    gate: Any,
    threshold: float,
    output_mask: list[bool],
    rows: Any,
    row_scale: float,
) -> tuple[Tensor, ...]:
    shape = [*grad_output.shape[:-1], weight.shape[1]]
    dinput = grad_output.new_empty(shape) if output_mask[0] else None
    return _fake_backward(dinput, grad_output, weight, delta, score, output_mask)


def _fake_conv2d(
    input: Tensor,
    weight: Tensor,
    delta: Any,
    score: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    gate: Any,
    threshold: float,
    rows: Any = None,
    row_scale: float = 1.0,
    training: bool = False,
) -> Tensor:
    bias = None if bias is None else bias.to(input.dtype)
    return F.conv2d(input, weight.to(input.dtype), bias, stride, padding, dilation, groups)


def _fake_conv2d_backward(
    grad_output: Tensor,
    input: Any,
    input_size: Any,
    weight: Tensor,
    delta: Any,
    score: Any,
    gate: Any,
    threshold: float,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_mask: list[bool],
    rows: Any,
    row_scale: float,
) -> tuple[Tensor, ...]:
    dinput = None
    if output_mask[0]:
        like = grad_output.new_empty([grad_output.shape[0], weight.shape[1] * groups, *input_size])
        weight_t = weight.to(grad_output.dtype)
        dinput = torch.ops.aten.convolution_backward(
            grad_output,
            like,
            weight_t,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [True, False, False],
        )[0]
    return _fake_backward(dinput, grad_output, weight, delta, score, output_mask)


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


def register() -> None:
    """Tell torch about all fakes; the extension must be loaded."""
    fakes: dict[str, Callable[..., Any]] = {
        "reconstruct": lambda out, weight, delta, score, gate, threshold: None,
        "foreach_reconstruct": lambda outs, weights, deltas, scores, gates, threshold: None,
        "gated_linear": _fake_linear,
        "gated_linear_backward": _fake_linear_backward,
        "gated_conv2d": _fake_conv2d,
        "gated_conv2d_backward": _fake_conv2d_backward,
    }
    for name, function in fakes.items():
        torch.library.register_fake(f"taps_ext::{name}", _on_one_device(function))
