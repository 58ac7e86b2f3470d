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

_KNOWN = {1: True, 0: False, -1: None}  # a gate in lists


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


def _rows_of(task_ids: Tensor, chosen: Sequence[bool], rows: int) -> int:
    """How many of so many rows belong to the chosen tasks: those of none are known where the ids are on a CPU."""
    if type(task_ids) is not Tensor or task_ids.device.type != "cpu":
        return rows if any(chosen) else 0
    known = sum(1 for task in task_ids.tolist() if task >= 0 and chosen[task])
    return rows // max(1, task_ids.numel()) * known


def _mixed_backward(
    grad_output: Tensor,
    weight: Tensor,
    task_ids: Tensor,
    closed: Sequence[bool],
    input_bias_weight: Sequence[bool],
    delta_mask: Sequence[bool],
    score_mask: Sequence[bool],
) -> int:
    """As a single task's layer: each sample once for the input, once for what its task is asked for; W's own gradient
    is of all samples."""
    dinput, _, dweight = input_bias_weight
    product = _product(grad_output, weight)
    side = [s or (d and not c) for d, s, c in zip(delta_mask, score_mask, closed, strict=True)]
    samples = max(1, task_ids.numel())
    taken = product // samples * _rows_of(task_ids, side, samples)
    return product * (dinput + dweight) + taken


def _mixed_linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None],
    task_ids: Tensor,
    gates: Sequence[int],
    threshold: float,
    *masks: Sequence[bool],
    out_val: Any = None,
) -> int:
    closed = [
        _known_closed(*one, threshold) for one in zip(deltas, scores, (_KNOWN[gate] for gate in gates), strict=True)
    ]
    return _mixed_backward(grad_output, weight, task_ids, closed, *masks)


def _mixed_conv2d_backward(
    grad_output: Tensor,
    input: Tensor | None,
    input_size: Sequence[int],
    weight: Tensor,
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None],
    task_ids: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    gates: Sequence[int],
    threshold: float,
    *masks: Sequence[bool],
    out_val: Any = None,
) -> int:
    listed = zip(deltas, scores, (_KNOWN[gate] for gate in gates), strict=True)
    closed = [_known_closed(*one, threshold) for one in listed]
    return _mixed_backward(grad_output, weight, task_ids, closed, *masks)


def _each_rank(input: Tensor, a: Sequence[Tensor | None], b: Sequence[Tensor | None], task_ids: Tensor) -> list[int]:
    """For each task what one product with A and one with B multiply; of ids on a device all rows are of the widest."""
    rows = input.shape[:-1].numel()
    of_rows = [
        0 if d is None or u is None else 2 * d.shape[0] * (d.shape[1] + u.shape[0]) for d, u in zip(a, b, strict=True)
    ]
    if type(task_ids) is not Tensor or task_ids.device.type != "cpu":
        widest = max(of_rows, default=0)
        return [rows * one if one == widest and of_rows.index(one) == task else 0 for task, one in enumerate(of_rows)]
    chosen = [_rows_of(task_ids, [task == other for other in range(len(a))], rows) for task in range(len(a))]
    return [count * one for count, one in zip(chosen, of_rows, strict=True)]


def _lowrank(
    input: Tensor,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    task_ids: Tensor,
    scales: Sequence[float],
    *,
    out_val: Any = None,
) -> int:
    return sum(_each_rank(input, a, b, task_ids))


def _lowrank_backward(
    grad_output: Tensor,
    input: Tensor,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    task_ids: Tensor,
    scales: Sequence[float],
    input_mask: bool,
    a_mask: Sequence[bool],
    b_mask: Sequence[bool],
    *,
    out_val: Any = None,
) -> int:
    """Two products for the input's gradient, one more for A's; for B's two, the forward's first among them."""
    total = 0
    for task, both in enumerate(_each_rank(input, a, b, task_ids)):
        down, up = a[task], b[task]
        if not both or down is None or up is None:
            continue
        inner = both // (down.shape[1] + up.shape[0])
        of_a, of_b = inner * down.shape[1], inner * up.shape[0]
        total += of_b * (input_mask or a_mask[task]) + of_a * (input_mask + a_mask[task])
        total += (of_a + of_b) * b_mask[task]
    return total


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
        "mixed_linear": _forward,
        "mixed_linear_backward": _mixed_linear_backward,
        "mixed_conv2d": _forward,
        "mixed_conv2d_backward": _mixed_conv2d_backward,
        "mixed_lowrank": _lowrank,
        "mixed_lowrank_backward": _lowrank_backward,
    }
    patching = ("sum", "measure", "encode", "check", "prove", "write", "swap")
    moving = ("unpack", "encode", *(f"patch_{name}" for name in patching))
    formulas.update(dict.fromkeys(moving, _nothing))
    for name, formula in formulas.items():
        register_flop_formula(getattr(torch.ops.taps_ext, name), get_raw=True)(formula)
