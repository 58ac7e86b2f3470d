"""Where a base keeps its samples, in what each module takes and returns, found out by running it on two samples and on
three: sizes alone would take 64 windows for 64 samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .frame import Frame


class Place(NamedTuple):
    """Where a tensor has its samples: in dimension `dim`, whose size is `before * samples * after`."""

    dim: int
    before: int = 1
    after: int = 1

    def cut(self, tensor: Tensor, batch: int, first: int, count: int) -> Tensor:
        """The rows of `count` samples from `first` on."""
        if self.before == 1:
            return tensor.narrow(self.dim, first * self.after, count * self.after)
        apart = tensor.unflatten(self.dim, (self.before, batch, self.after)).narrow(self.dim + 1, first, count)
        return apart.flatten(self.dim, self.dim + 2)

    def one(self, tensor: Tensor, batch: int, sample: int) -> Tensor:
        """What one sample has, without the dimension of samples where it has one row there."""
        rows = self.cut(tensor, batch, sample, 1)
        return rows.squeeze(self.dim) if self.before == self.after == 1 else rows

    def join(self, pieces: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The rows of all samples again."""
        if self.before == 1:
            return torch.cat(list(pieces), self.dim)
        apart = [
            piece.unflatten(self.dim, (self.before, count, self.after))
            for piece, count in zip(pieces, counts, strict=True)
        ]
        return torch.cat(apart, self.dim + 1).flatten(self.dim, self.dim + 2)


Places = tuple[Place | None, ...]
"""Of the tensors among arguments or outputs, in their order; None has no samples."""


class Layout(NamedTuple):
    """Where one module has its samples."""

    inputs: Places
    outputs: Places

    @property
    def apart(self) -> bool:
        """Whether one task's rows can be run by themselves."""
        return any(place is not None for place in self.inputs) and None not in self.outputs


class _Seen(NamedTuple):
    inputs: list[Tensor]
    outputs: list[Tensor]


def signature_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.dim() for tensor in tensors)


Layouts = Mapping[tuple[str, tuple[int, ...]], Layout | None]
"""By module name and the numbers of its arguments' dimensions; None where two calls differ."""


class Probe:
    """Notes what each routed module takes and returns while the base runs.

    Attributes:
        seen: by module name, of each call. read: modules whose tensors code outside of routed modules reads. within:
            by the module whose forward it is the others whose tensors it reads (attention its projections').
    """

    def __init__(self) -> None:
        self.seen: dict[str, list[_Seen]] = {}
        self.read: set[str] = set()
        self.within: dict[str, set[str]] = {}
        self._inside: list[str] = []
        self._buffers: dict[tuple[int, str], Any] = {}

    def run(self, module: nn.Module, frame: Frame, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The base's own forward of a module."""
        inputs = [leaf.detach() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name: str = module.__dict__["_taps_name"]
        self._inside.append(name)
        try:
            output = base(*args, **kwargs)
        finally:
            self._inside.pop()
        outputs = [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.seen.setdefault(name, []).append(_Seen(inputs, outputs))
        return output

    def buffer(self, module: nn.Module, key: str, own: Any) -> Any:
        """A copy of a module's buffer, which the base may write to."""
        copied = own.clone() if isinstance(own, Tensor) else own
        return self._buffers.setdefault((id(module), key), copied)

    def sets(self, module: nn.Module, key: str, value: Any) -> bool:
        """A module's buffer is set: that of the copy."""
        self._buffers[id(module), key] = value
        return True

    def touches(self, name: str) -> bool:
        """Whether it matters who reads a module's tensors: not where its own forward does."""
        return name not in self._inside

    def reads(self, name: str) -> None:
        """A tensor of a module is used by other code."""
        if self._inside:
            self.within.setdefault(self._inside[-1], set()).add(name)
        else:
            self.read.add(name)


def layouts(two: Probe, three: Probe) -> dict[tuple[str, tuple[int, ...]], Layout | None]:
    """Where samples are, by two runs of the base: on samples a and b, and on a, b and b."""
    found: dict[tuple[str, tuple[int, ...]], Layout | None] = {}
    for name, calls in three.seen.items():
        fewer = two.seen.get(name, [])
        for place, call in enumerate(calls):
            key = name, signature_of(call.inputs)
            layout = None
            if len(fewer) == len(calls):
                inputs = places(fewer[place].inputs, call.inputs)
                outputs = places(fewer[place].outputs, call.outputs)
                layout = None if inputs is None or outputs is None else Layout(inputs, outputs)
            found[key] = layout if found.get(key, layout) == layout else None
    return found


def places(two: Sequence[Tensor], three: Sequence[Tensor]) -> Places | None:
    """Where the tensors of two runs, on samples a and b and on a, b and b, have them; None where nothing says so."""
    if len(two) != len(three):
        return None
    found: list[Place | None] = []
    for a, b in zip(two, three, strict=True):
        differing = [dim for dim in range(b.dim()) if a.dim() == b.dim() and a.shape[dim] != b.shape[dim]]
        if a.dim() != b.dim() or len(differing) > 1:
            return None
        if not differing:
            found.append(None)
            continue
        dim = differing[0]
        each, rest = divmod(b.shape[dim], 3)
        if rest or a.shape[dim] != 2 * each:
            return None
        place = _place(b, dim, each)
        if place is None:
            return None
        found.append(place)
    return tuple(found)


def _place(three: Tensor, dim: int, each: int) -> Place | None:
    """Whether a sample's rows lie side by side, or those of all samples in turns: the second and third samples are the
    same, so that theirs are. None where neither is clearly so."""
    if each == 1:
        return Place(dim)

    def apart(shape: tuple[int, int], where: int) -> float:
        rows = three.unflatten(dim, shape).double()
        difference = rows.select(where, 1) - rows.select(where, 2)
        return float(difference.abs().nan_to_num().sum())

    together, turns = apart((3, each), dim), apart((each, 3), dim + 1)
    if min(together, turns) > 0.1 * max(together, turns) or together == turns:
        return None
    return Place(dim, 1, each) if together < turns else Place(dim, each, 1)
