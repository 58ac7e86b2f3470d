"""Codecs: how one delta becomes the tensors in a file, and back.

A codec owns part suffixes: the delta of layer `l` is stored as tensors `l.<part>`. `dense` is the lossless
one; `weight` holds the task's whole weight instead, where no delta gives it exactly. Another codec is a class
with these four members, made known by `register`; files name it in `taps.codecs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from .errors import CodecError, Path, show


class Codec(Protocol):
    """`name` as written in files, `parts` the suffixes it stores, `lossless` whether decode returns the same
    bits.
    """

    @property
    def name(self) -> str: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def lossless(self) -> bool: ...

    def encode(self, name: str, delta: Tensor) -> dict[str, Tensor]:
        """The parts of `delta`, exactly one tensor for each of `self.parts`. `name` is the layer, for
        messages.
        """
        ...

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The delta. Parts come from a file: shapes, dtypes and values are checked here, and CodecError is
        raised.
        """
        ...


class Whole:
    """One tensor as it is, in its own dtype: the delta, or the weight that takes the base's place."""

    lossless = True

    def __init__(self, name: str, part: str) -> None:
        self.name = name
        self.parts: tuple[str, ...] = (part,)

    def encode(self, name: str, delta: Tensor) -> dict[str, Tensor]:
        return {self.parts[0]: delta}

    def decode(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[self.parts[0]]


_CODECS: dict[str, Codec] = {}


def register(codec: Codec) -> None:
    """Makes a codec known by its name. Raises ValueError if the name is taken or the parts are not usable."""
    if codec.name in _CODECS:
        raise ValueError(f"codec {codec.name!r} is already registered")
    if not codec.parts or len(set(codec.parts)) != len(codec.parts) or "score" in codec.parts:
        raise ValueError(f"codec {codec.name!r}: expected distinct part suffixes other than 'score', got {codec.parts}")
    _CODECS[codec.name] = codec


def get(name: str, *, layer: str, path: Path) -> Codec:
    """The codec called `name`; raises CodecError naming it, the layer and the known ones."""
    if name not in _CODECS:
        raise CodecError(
            path, f"layer {show(layer)}: unknown codec {show(name)}; known are {', '.join(sorted(_CODECS))}"
        )
    return _CODECS[name]


def known() -> tuple[str, ...]:
    """Names of all registered codecs, sorted."""
    return tuple(sorted(_CODECS))


def part_suffixes() -> frozenset[str]:
    """All suffixes that any registered codec stores."""
    return frozenset(part for codec in _CODECS.values() for part in codec.parts)


register(Whole("dense", "delta"))
register(Whole("weight", "weight"))
