"""The W_t of many layers at once, and what their gradients are to Deltas and scores: on a GPU three launches in all,
however many layers there are (up to 256), instead of four for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..extension import C
from .fakes import register_fake
from .once import once_differentiable
from .weight import in_batches, plain_gradients


class Gated(NamedTuple):
    """One weight with what is added to it.

    `weight`: W. `delta`: shaped like it. `score`, `gate`, `threshold`: as in :func:`taps_ext.gated_linear`. `dtype`: of
    W_t; None is the weight's.
    """

    weight: Tensor
    delta: Tensor
    score: Tensor | None = None
    gate: bool | None = None
    threshold: float = 0.1
    dtype: torch.dtype | None = None


def foreach_effective_weight(layers: Sequence[Gated]) -> list[Tensor]:
    """`round(W + g * Delta)` of every entry as a tensor of its own, with the gradients of TAPS (arXiv 2203.16708,
    equations 2 and 4); where the host knows the gate to be closed and nothing is cast, W itself.

    Backward is one node for all of them: it runs when the gradients of all W_t are there, so that hooks on Deltas run
    at its end. The weights get no gradient of their own.

    Raises:
        RuntimeError: as :func:`taps_ext.ops.foreach_reconstruct_`; a weight that requires gradients.
    """
    if torch.is_grad_enabled():
        for index, layer in enumerate(layers):
            if layer.weight.requires_grad:
                raise RuntimeError(f"layers[{index}].weight: expected a frozen one, got one that requires gradients")
    if C is None or (reference.may_be_transformed() and any(reference.transformed(*layer[:3]) for layer in layers)):
        return [
            reference.reconstruct(
                layer.weight,
                layer.delta,
                layer.score,
                gate=layer.gate,
                threshold=layer.threshold,
                dtype=layer.dtype,
                read=layer.gate is not False,
            )
            for layer in layers
        ]
    facts: list[Fact] = []
    tensors: list[Tensor | None] = []
    for weight, delta, score, gate, threshold, dtype in layers:
        facts.append(Fact(gate, -1 if gate is None else int(gate), threshold, dtype or weight.dtype))
        tensors += (weight, delta, score)
    return list(_Together.apply(facts, *tensors)) if layers else []


class Fact(NamedTuple):
    """What is known of a layer beside its tensors. `known`: the gate as the operators take it in lists."""

    gate: bool | None
    known: int
    threshold: float
    dtype: torch.dtype


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, facts: list[Fact], *tensors: Any) -> tuple[Tensor, ...]:
        weights, deltas, scores = tensors[::3], tensors[1::3], tensors[2::3]
        ctx.facts = facts
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*deltas, *scores)
        made = []
        lists = _Lists(5)
        for fact, weight, delta, score in zip(facts, weights, deltas, scores, strict=True):
            if fact.gate is False and fact.dtype == weight.dtype:
                made.append(weight.view_as(weight))
                continue
            made.append(torch.empty_like(weight, dtype=fact.dtype))
            lists.add(fact.threshold, made[-1], weight, delta, score, fact.known)
        for threshold, columns in lists:
            torch.ops.taps_ext.foreach_reconstruct.default(*columns, threshold)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        facts: list[Fact] = ctx.facts
        saved = ctx.saved_tensors  # once: who recomputes them does so each time
        deltas, scores = saved[: len(facts)], saved[len(facts) :]
        wanted = ctx.needs_input_grad[1:]
        if reference.may_be_transformed() or any(map(in_batches, gradients)):
            return None, *(
                one
                for i, (fact, *tensors) in enumerate(zip(facts, gradients, deltas, scores, strict=True))
                for one in (None, *_plainly(fact, *tensors, *wanted[3 * i + 1 : 3 * i + 3]))
            )
        found: list[Tensor | None] = []
        lists = _Lists(6)
        for i, (fact, gradient, delta, score) in enumerate(zip(facts, gradients, deltas, scores, strict=True)):
            want_delta, want_score = wanted[3 * i + 1] and fact.gate is not False, wanted[3 * i + 2]
            if gradient is None or not (want_delta or want_score):
                found += (None, None, None)
                continue
            as_it_is = want_delta and fact.gate is True and _fits(gradient, delta)
            none = gradient.new_empty(0)
            ddelta = torch.empty_like(delta) if want_delta and not as_it_is else none
            dscore = torch.empty_like(score) if want_score else none
            if want_score or not as_it_is:
                lists.add(fact.threshold, ddelta, dscore, gradient, delta, score, fact.known)
            found += (None, (gradient if as_it_is else ddelta) if want_delta else None, dscore if want_score else None)
        for threshold, columns in lists:
            torch.ops.taps_ext.foreach_settle.default(*columns, threshold)
        return None, *found


def _plainly(
    fact: Fact, gradient: Tensor | None, delta: Tensor, score: Tensor | None, of_delta: bool, of_score: bool
) -> tuple[Tensor | None, Tensor | None]:
    if gradient is None:
        return None, None
    return plain_gradients(gradient, delta, score, fact.gate, fact.threshold, of_delta=of_delta, of_score=of_score)


class _Lists:
    """Columns of arguments, apart by threshold: overrides may have given some layers another one."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.found: dict[float, tuple[list[Any], ...]] = {}

    def add(self, threshold: float, *entries: Any) -> None:
        columns = self.found.get(threshold)
        if columns is None:
            columns = self.found[threshold] = tuple([] for _ in range(self.width))
        for column, entry in zip(columns, entries, strict=True):
            column.append(entry)

    def __iter__(self) -> Iterator[tuple[float, tuple[list[Any], ...]]]:
        return iter(self.found.items())


def _fits(gradient: Tensor, delta: Tensor) -> bool:
    """True if G, of an open gate, is what its Delta gets, as it is."""
    own, other = gradient.stride(), delta.stride()
    if gradient.dtype != delta.dtype:
        return False
    return own == other or all(size == 1 or a == b for size, a, b in zip(gradient.shape, own, other, strict=True))


def _fake_settle(
    delta_gradients: Any, score_gradients: Any, gradients: Any, deltas: Any, scores: Any, gates: Any, threshold: float
) -> None:
    return None


if C is not None:
    register_fake("foreach_settle", _fake_settle)
