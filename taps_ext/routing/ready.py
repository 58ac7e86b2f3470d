"""The W_t that a forward with gradients made of many layers at once, before the base runs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

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


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class Ready:
    """W_t by module name, while the forward runs and where a part of it is recomputed in backward.

    Args:
        made: the tensors, and the `id` of the module that each was made for.
        bound: what else of the forward holds them.

    They are held until the forward ends; after that the graph holds each one until its layer's backward has run.
    """

    def __init__(self, made: Mapping[str, tuple[Tensor, int]], bound: MutableMapping[str, Any]) -> None:
        self._made: dict[str, tuple[Tensor | None, int]] = dict(made)
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
        if found[1] != id(module):
            raise misplaced(name)
        if found[0] is not None:
            return found[0]
        # Recomputed in backward: its gradients go to its own tensors at once, where it is the recomputation that is
        # differentiated (reentrant checkpointing). Where that only asks for what the first forward saved, in the same
        # order and no more, what this node saves is none of its business.
        gated = part.gathers(module, sampled=False)
        if gated is None:
            return None
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            (again,) = ops.foreach_effective_weight([gated])
        return again

    def release(self) -> None:
        """The forward is over."""
        self._bound.clear()
        self._made = {name: (None, host) for name, (_, host) in self._made.items()}
