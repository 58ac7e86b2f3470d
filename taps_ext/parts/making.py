"""A module's own forward with W_t in the place of its weights: the road of all that has no kernel of ours.

Convolutions of one and three dimensions, transposed ones, recurrent layers, experts, layers written by hand: torch
multiplies, whatever the product is. W_t is made before the forward, in borrowed memory, and again where backward asks
for it: the graph keeps what it is made of, and no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import UnsupportedModuleError
from .host import base_weight, owner_of, weight_name
from .part import Below, Part


class Made(NamedTuple):
    """W_t by the `id` of its module and its name there, of one frame: another forward inside has its own."""

    frame: object
    weights: Mapping[tuple[int, str], Tensor]


_made: ContextVar[Made] = ContextVar("taps_ext_made", default=Made(None, {}))  # noqa: B039  (never written to)
made = _made.get

# What every saved tensor is asked: the tensor itself, or how to make it again.
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class _Recipe:
    """How a W_t is made again, as long as what it is made of stays as it was."""

    def __init__(self, part: Part, below: Below) -> None:
        self.part, self.below = part, below
        self.seen = self._now()

    def _now(self) -> tuple[Any, ...]:
        tensors = [base_weight(self.below.host), *self.part.parameters(), *self._under()]
        return self.part.setting(), *((id(t), -1 if t.is_inference() else t._version) for t in tensors)

    def _under(self) -> Iterable[Tensor]:
        for part in self.below.parts:
            yield from part.parameters()

    def make(self) -> Tensor:
        with ops.lending():
            return self.part.weight_over(self.below)

    def again(self) -> Tensor:
        """Raises RuntimeError where W, Delta or the gate is not what it was, as autograd does for a saved tensor."""
        if self._now() != self.seen:
            raise RuntimeError(
                f"{self.below.host}: W, its change or its gate was modified by an inplace operation between this "
                "forward and its backward, which needs them as they were; call backward before optimizer.step()"
            )
        return self.make()


class _Saved(NamedTuple):
    """A view of a W_t that backward asks for."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any


class _Hooks:
    """What autograd keeps in place of tensors inside of a module's forward; all that is no W_t goes to the hooks around
    (checkpointing's, for one)."""

    def __init__(self, recipes: Mapping[int, _Recipe]) -> None:
        self.recipes = recipes
        outer = _hooks(True)
        self.keep, self.give = outer if outer else (_itself, _itself)

    def pack(self, tensor: Tensor) -> Any:
        recipe = None if tensor.layout is not torch.strided else self.recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None:
            return self.keep(tensor)
        return _Saved(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Saved):
            return self.give(kept)
        return kept.recipe.again().as_strided(kept.size, kept.stride, kept.offset)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def run(
    forward: Callable[..., Any],
    over: Iterable[tuple[Part, Below]],
    frame: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module's forward, during which its weights are those of parts.

    Args:
        over: the uppermost part over each weight, and what it stands on. frame: the forward of the whole model.

    Raises:
        UnsupportedModuleError: the forward writes to a weight. RuntimeError: in backward, where W, Delta or the gate
            was written to since.
    """
    outer = made()
    weights = dict(outer.weights) if outer.frame is frame else {}
    recipes: dict[int, _Recipe] = {}
    versions: list[tuple[Below, Tensor, int]] = []
    for part, below in over:
        host = below.host
        if torch.is_grad_enabled():
            recipe = _Recipe(part, below)
            weight = recipe.make()
            own = {t.untyped_storage()._cdata for t in (base_weight(host), *part.parameters()) if _plain(t)}
            if _plain(weight) and (storage := weight.untyped_storage()._cdata) not in own:
                recipes[storage] = recipe
        else:
            with ops.lending():
                weight = part.weight_over(below)
        weights[id(owner_of(host)), weight_name(host)] = weight
        if not weight.is_inference():
            versions.append((below, weight, weight._version))
    token = _made.set(Made(frame, weights))
    try:
        if recipes:
            hooks = _Hooks(recipes)
            with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
                output = forward(*args, **kwargs)
        else:
            output = forward(*args, **kwargs)
    finally:
        _made.reset(token)
    for below, weight, before in versions:
        if weight._version != before:
            raise UnsupportedModuleError(
                f"{type(owner_of(below.host)).__name__}: its {weight_name(below.host)} is written to in the module's "
                "forward, which would change a W_t that is made anew each time, not the task; write to it outside, or "
                "name the layer in exclude_modules"
            )
    return output


def _plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (Tensor, torch.nn.Parameter)
