"""FLOP formulas of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

The counter's conventions: two operations for each multiply-add of a matrix product or a convolution, places in the
padding among them; nothing for what is done element by element. So W + g * Delta, <G, Delta> and a bias count nothing,
and a gated layer's forward counts what the stock layer's does, whatever its gate.

A backward counts one product for the input's gradient and one for the weight side, of the samples that `rows` picked
where it did. The weight side is one product however it is done: G = dL/dW_t, of which Delta, score and weight take what
they need; or, of a convolution whose score alone asks for a gradient, maybe conv(x, Delta), as <conv(x, Delta), dL/dy>
is <G, Delta>. Of layers in groups torch's own formula for a convolution's weight gradient counts `groups` times what is
multiplied (torch 2.14); these do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _known_closed(delta: Tensor | None, score: Tensor | None, gate: bool | None, threshold: float) -> bool:
    """Whether the operator knows that the layer is the base's: on a CPU it reads the score, elsewhere devices do."""
    if delta is None or gate is not None:
        return delta is None or not gate
    real = type(score) in (Tensor, torch.nn.Parameter) and score.device.type == "cpu"  # type: ignore[union-attr]
    return real and bool(score < threshold)  # type: ignore[operator]


def _backward(
    grad_output: Tensor,
    weight: Tensor,
    closed: bool,
    output_mask: Sequence[bool],
    samples: int,
    rows: Tensor | None,
) -> int:
    """Of `samples` in `grad_output`, of which `rows` picked some for the weight side."""
    dinput, ddelta, dscore, _, dweight = output_mask
    product = _product(grad_output, weight)
    side = dscore or dweight or (ddelta and not closed)
    taken = product if rows is None else product // max(1, samples) * rows.numel()
    return (product if dinput else 0) + (taken if side else 0)


def _product(output: Tensor, weight: Tensor) -> int:
    """Of a layer with outputs [..., N] or [B, O, H, W] and a weight [N, K] or [O, I / groups, kH, kW]."""
    return 2 * output.numel() * weight.shape[1:].numel()


def _forward(input: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return _product(out_val, weight)


def _linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None,
    gate: bool | None,
    threshold: float,
    output_mask: Sequence[bool],
    rows: Tensor | None,
    row_scale: float,
    *,
    out_val: Any = None,
) -> int:
    closed = _known_closed(delta, score, gate, threshold)
    return _backward(grad_output, weight, closed, output_mask, grad_output.shape[:-1].numel(), rows)


def _conv2d_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None,
    gate: bool | None,
    threshold: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    rows: Tensor | None,
    row_scale: float,
    *,
    out_val: Any = None,
) -> int:
    closed = _known_closed(delta, score, gate, threshold)
    samples = grad_output.shape[0] if grad_output.dim() == 4 else 1
    return _backward(grad_output, weight, closed, output_mask, samples, rows)


def _nothing(*_: Any, **__: Any) -> int:
    return 0


def register() -> None:
    """Tell torch's counter about all operators; the extension must be loaded."""
    formulas: dict[str, Any] = {
        "reconstruct": _nothing,
        "foreach_reconstruct": _nothing,
        "foreach_settle": _nothing,
        "packed_linear": _forward,
        "gated_linear": _forward,
        "gated_linear_backward": _linear_backward,
        "gated_conv2d": _forward,
        "gated_conv2d_backward": _conv2d_backward,
    }
    patching = ("sum", "measure", "encode", "check", "prove", "write", "swap")
    moving = ("unpack", "encode", *(f"patch_{name}" for name in patching))
    formulas.update(dict.fromkeys(moving, _nothing))
    for name, formula in formulas.items():
        register_flop_formula(getattr(torch.ops.taps_ext, name), get_raw=True)(formula)
