"""Caches: buffers that a base's forward builds by itself, as timm's ConViT does for the size of its input.

They are no part of the base's state, and a base that has not run has others or none. A task belongs to that one: what
tells a base by its tensors goes by them as they were when the base was adapted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..store import tensor_digest
from ..store.errors import UnsupportedTensorError


def digest(tensor: Tensor) -> str | None:
    """Of a tensor with bytes of its own."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return None
    try:
        return tensor_digest(tensor.detach())
    except UnsupportedTensorError:
        return None


def passing(base: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """The buffers that a base's state does not hold, by all of their names."""
    for name, module in base.named_modules(remove_duplicate=False):
        for key in module._non_persistent_buffers_set:
            yield f"{name}.{key}" if name else key, module._buffers.get(key)


class Caches:
    """The buffers that are no part of a base's state, as they are now. Those that a forward builds anew in another
    shape are caches; one that has other values in a shape that it had before is none."""

    def __init__(self, base: nn.Module) -> None:
        self.first = dict(passing(base))
        self.built: dict[tuple[str, torch.Size], str | None] = {}
        self.note(base)

    def note(self, base: nn.Module) -> None:
        """Know them as those of this base, whom they were taken from or a copy of it."""
        _known[base] = self

    @torch.no_grad()
    def follow(self, base: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
        """The base was moved or cast by `fn`."""
        now = dict(passing(base))
        for name, first in self.first.items():
            tensor = now.get(name)
            if first is not None:
                same = tensor is not None and not self._is_built(name, tensor)
                self.first[name] = tensor if same else fn(first)
        self.built = {}

    def holds(self, name: str, tensor: Tensor) -> bool:
        """True for a cache with the values that it has in this shape, as far as they are known."""
        if not self._is_built(name, tensor):
            return False
        now = digest(tensor)
        return self.built.setdefault((name, tensor.shape), now) == now

    def fresh(self, base: nn.Module) -> dict[str, Tensor]:
        """The base's buffers by all of their names, with caches as they were at first, if they were there."""
        found = dict(base.named_buffers(remove_duplicate=False))
        for name, tensor in passing(base):
            if tensor is not None and self._is_built(name, tensor):
                del found[name]
                first = self.first.get(name)
                found |= {} if first is None else {name: first}
        return found

    def _is_built(self, name: str, tensor: Tensor) -> bool:
        first = self.first.get(name)
        return first is None or first.shape != tensor.shape


_known: weakref.WeakKeyDictionary[nn.Module, Caches] = weakref.WeakKeyDictionary()


def fresh_buffers(base: nn.Module) -> dict[str, Tensor]:
    """A base's buffers by all of their names, as they were before its forward built caches, where that is known."""
    caches = _known.get(base)
    return dict(base.named_buffers(remove_duplicate=False)) if caches is None else caches.fresh(base)


def is_cache(base: nn.Module, name: str, tensor: Tensor) -> bool:
    """True for a buffer that the forward of an adapted base has built since, and builds for a fresh base, too."""
    caches = _known.get(base)
    return caches is not None and name in dict(passing(base)) and caches.holds(name, tensor)


def appeared(base: nn.Module) -> set[int]:
    """The buffers (by id) that the forward of an adapted base has built since, and that were not there before."""
    caches = _known.get(base)
    return set() if caches is None else {id(t) for name, t in passing(base) if caches.first.get(name) is None}


def forget(base: nn.Module) -> None:
    """The base is nobody's any more."""
    _known.pop(base, None)
