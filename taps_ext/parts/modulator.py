"""Modulator: a matrix over the outputs of a layer, W_t = M W; of low rank over axes of its responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .change import Change, register_change, without_autocast
from .gate import Gate
from .host import base_weight


@register_change("modulator")
class Modulator(Change):
    """`W_t = M W`, with W as a matrix `[O, K]`: a 1 x 1 convolution behind the layer (Reparameterizing Convolutions for
    Incremental Multi-Task Learning, arXiv 2007.12540). M `[O, O / groups]` is the identity at the start; of a grouped
    convolution it is block-diagonal, and its rows are those of the blocks.

    Args:
        normalise: the rows of M are `gain * v / |v|` (the paper's normalised feature fusion), v being held as `matrix`.

    Raises:
        ValueError: `normalise` is no bool.
    """

    role = "weight"  # decay would pull M to zero, not to the identity
    settings: ClassVar[tuple[str, ...]] = ("normalise",)

    matrix: nn.Parameter
    gain: nn.Parameter

    def __init__(self, host: nn.Module, *, normalise: bool = False, held: bool = True) -> None:
        if not isinstance(normalise, bool):
            raise ValueError(f"normalise: expected True or False, got {normalise!r}")
        self.normalise, self.groups = normalise, getattr(host, "groups", 1)
        self.elements = base_weight(host).numel()
        super().__init__(host, held=held)

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        shapes: dict[str, Sequence[int]] = {"matrix": (len(weight), len(weight) // self.groups)}
        return {**shapes, "gain": weight.shape[:1]} if self.normalise else shapes

    def start(self, weight: Tensor) -> None:
        self._blocks(self.matrix).diagonal(dim1=1, dim2=2).fill_(1.0)
        if self.normalise:
            self.gain.fill_(1.0)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """The block of each group, `[groups, O / groups, columns]`."""
        return matrix.view(self.groups, -1, matrix.shape[1])

    def _lengths(self, matrix: Tensor) -> Tensor:
        """Of the rows, which they are divided by."""
        return matrix.norm(dim=1)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """M as it multiplies, in blocks, differentiable."""
        matrix = self.matrix.to(dtype)
        if self.normalise:
            matrix = matrix * (self.gain.to(dtype) / self._lengths(matrix))[:, None]
        return self._blocks(matrix)

    @torch.no_grad()
    def take(self, blocks: Tensor) -> None:
        """Make M what these blocks are."""
        self.matrix.copy_(blocks.reshape(self.matrix.shape))
        if self.normalise:
            self.gain.copy_(self.matrix.norm(dim=1))

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.matrix.dtype)  # double stays double
        size = len(weight) // self.groups
        rows = weight.to(wide).reshape(self.groups, size, weight.shape[1:].numel())
        with without_autocast(weight):
            return (self.whole(wide) @ rows[:, : self.matrix.shape[1]]).reshape(weight.shape).to(weight.dtype)

    def operations(self, input: Tensor, output: Tensor) -> int:
        return 0 if self.owed else 2 * self.matrix.shape[1] * self.elements

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.owed or gate.known is False else self.elements * dtype.itemsize


@register_change("axes")
class Axes(Modulator):
    """`W_s = U^T W`, U being the axes of a layer's responses in each group, `[O / groups, O / groups]`, the largest
    first; and the responses' mean `[O]`, without the layer's bias, which low ranks above it restore."""

    settings = ()

    mean: nn.Parameter

    def __init__(self, host: nn.Module, *, held: bool = True) -> None:
        super().__init__(host, held=held)

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {**super().shapes(weight), "mean": weight.shape[:1]}


@register_change("low-modulator")
class LowModulator(Modulator):
    """`W_t = M W_s` of the first `rank` outputs that lie below in each group: M `[O, min(rank, O / groups)]`.

    It leaves a layer as it is only over axes along which its responses lie (:class:`Axes`), with their lost mean
    restored. A row of zeros stays one.

    Raises:
        ValueError: `rank` is no int of 1 or more.
    """

    settings = ("normalise", "rank")

    def __init__(self, host: nn.Module, *, rank: int, normalise: bool = False, held: bool = True) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an int >= 1, got {rank!r}")
        self.rank = rank
        super().__init__(host, normalise=normalise, held=held)

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        full = super().shapes(weight)
        rows, columns = full["matrix"]
        return {**full, "matrix": (rows, min(self.rank, columns))}

    def start(self, weight: Tensor) -> None:
        super().start(weight)
        if self.normalise:
            self.gain.copy_(self.matrix.norm(dim=1))

    def _lengths(self, matrix: Tensor) -> Tensor:
        return super()._lengths(matrix).clamp_min(torch.finfo(matrix.dtype).tiny)
