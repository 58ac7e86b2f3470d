"""The W_t that a forward with gradients made of many layers at once, before the base runs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import TapsError
from ..parts import Part


def misplaced(name: str) -> TapsError:
    return TapsError(
        f"{name}: another module has taken its place in the base since the task was added, which does not "
        "know the task; change the base before it is adapted"
    )


def re_registered(name: str, what: str) -> TapsError:
    return TapsError(
        f"{name}: {what} since the model was adapted, as by pruning, a norm of weights or another parametrisation, and "
        "its tasks know no such base; undo that (prune.remove, remove_parametrizations), or do it before TaskModel "
        "takes the base"
    )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Made(NamedTuple):
    """A W_t while the forward runs, the `id` of the module that it is for, and what it was made with: the base's own
    tensors are read anew where it is made again, since graphs hold frames and are to hold no base."""

    weight: Tensor | None
    host: int
    gate: bool | None
    threshold: float
    dtype: torch.dtype


class Ready:
    """W_t by module name, while the forward runs and where a part of it is recomputed in backward.

    Args:
        made: the tensors, what they were made of, and the `id` of the module that each was made for.
        bound: what else of the forward holds them.

    They are held until the forward ends; after that the graph holds each one until its layer's backward has run.
    """

    def __init__(self, made: Mapping[str, tuple[Tensor, ops.Gated, int]], bound: MutableMapping[str, Any]) -> None:
        self._made = {
            name: _Made(weight, host, gated.gate, gated.threshold, weight.dtype)
            for name, (weight, gated, host) in made.items()
        }
        self._bound = bound

    def __contains__(self, name: str) -> bool:
        return name in self._made

    def of(self, name: str, module: nn.Module, part: Part) -> Tensor | None:
        """The W_t of a module under `part`, or None where the part is to make its own.

        Raises:
            TapsError: it was made for another module, in whose place this one is.
        """
        found = self._made.get(name)
        if found is None:
            return None
        if found.host != id(module):
            raise misplaced(name)
        if found.weight is not None:
            return found.weight
        # Recomputed in backward: its gradients go to its own tensors at once, where it is the recomputation that is
        # differentiated (reentrant checkpointing). Where that only asks for what the first forward saved, in the same
        # order and no more, what this node saves is none of its business. Whatever autocast says here, it is made as it
        # was.
        gated = part.gathers(module, sampled=False, dtype=found.dtype)
        if gated is None:
            return None
        gated = gated._replace(gate=found.gate, threshold=found.threshold)
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            (again,) = ops.foreach_effective_weight([gated])
        return again

    def release(self) -> None:
        """The forward is over."""
        self._bound.clear()
        self._made = {name: made._replace(weight=None) for name, made in self._made.items()}
