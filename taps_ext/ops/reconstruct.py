"""W_t = round(W + g * Delta) written into tensors that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import reference
from ..extension import C
from .fakes import register_fake


def check_gate(gate: Any, name: str) -> None:
    """Raise TypeError unless it is True, False or None: truth is not enough, `"closed"` has it."""
    if not (gate is True or gate is False or gate is None):
        raise TypeError(f"{name}: expected True, False or None, got {gate!r}")


def _check_writable(name: str, out: Tensor, operands: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError where autograd would not see what is written, as torch's own `out=` functions do."""
    if is_compiling():
        return
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *operands)):
        raise RuntimeError(
            f"{name}: expected tensors without gradients, which writing into one would lose; call it under "
            "torch.no_grad(), or taps_ext.ops.effective_weight"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name}: expected a normal tensor outside inference mode, got an inference tensor")


def reconstruct_(
    out: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    score: Tensor | None = None,
    *,
    gate: bool | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """Write `round(W + g * Delta)` into `out` (shape of `weight`, any floating dtype) and return it.

    `out` may be `weight` or `delta` itself, but not a part of one. Without gradients: see `effective_weight`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an `out` that begins before an operand ends and
            ends after it begins, gaps included; in grad mode, a tensor that requires gradients.
        TypeError: a gate that is no bool.
    """
    check_gate(gate, "gate")
    _check_writable("out", out, (weight, delta, score))
    if C is not None:
        torch.ops.taps_ext.reconstruct(out, weight, delta, score, gate, threshold)
        if not is_compiling() and not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        out.copy_(reference.reconstruct(weight, delta, score, gate=gate, threshold=threshold, dtype=out.dtype))
    return out


def foreach_reconstruct_(
    outs: Sequence[Tensor],
    weights: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
    scores: Sequence[Tensor | None] | None = None,
    *,
    gates: Sequence[bool | None] | None = None,
    threshold: float = 0.1,
) -> None:
    """:func:`reconstruct_` for every entry of the lists; on a GPU one launch serves up to 256 dense tensors.

    `scores` and `gates`: one for each tensor, or None for all; a gate of None is read from its score.

    Raises:
        TypeError: an argument that is no list or tuple, an entry of another type.
        RuntimeError: naming the entry, for lists of different lengths, for what :func:`reconstruct_` refuses, and for
            an entry of `outs` that shares memory with another one or with another entry's operands. Nothing is written
            then.
    """
    if not isinstance(outs, (list, tuple)):
        raise TypeError(f"outs: expected a list or a tuple, got {type(outs).__name__}")
    scores = [None] * len(outs) if scores is None else scores
    gates = [None] * len(outs) if gates is None else gates
    lists = {"outs": outs, "weights": weights, "deltas": deltas, "scores": scores, "gates": gates}
    for name, entries in lists.items():
        if not isinstance(entries, (list, tuple)):
            raise TypeError(f"{name}: expected a list or a tuple, got {type(entries).__name__}")
        if len(entries) != len(outs):
            raise RuntimeError(f"{name}: expected {len(outs)} entries like outs, got {len(entries)}")
        for index, entry in enumerate(entries):
            if name == "gates":
                check_gate(entry, f"gates[{index}]")
            elif not isinstance(entry, Tensor) and not (entry is None and name in ("deltas", "scores")):
                raise TypeError(f"{name}[{index}]: expected a tensor, got {type(entry).__name__}")
    if not outs:
        return
    for index, out in enumerate(outs):
        _check_writable(f"outs[{index}]", out, (weights[index], deltas[index], scores[index]))
    if C is None:
        for out, weight, delta, score, gate in zip(outs, weights, deltas, scores, gates, strict=True):
            reconstruct_(out, weight, delta, score, gate=gate, threshold=threshold)
        return
    known = [-1 if gate is None else int(gate) for gate in gates]
    torch.ops.taps_ext.foreach_reconstruct(outs, weights, deltas, scores, known, threshold)
    if not is_compiling():
        torch.autograd.graph.increment_version([out for out in outs if not out.is_inference()])


def _fake(out: Tensor, weight: Tensor, delta: Any, score: Any, gate: Any, threshold: float) -> None:
    return None


def _fake_foreach(outs: Any, weights: Any, deltas: Any, scores: Any, gates: Any, threshold: float) -> None:
    return None


if C is not None:
    register_fake("reconstruct", _fake)
    register_fake("foreach_reconstruct", _fake_foreach)
