"""Modulator: a matrix over the outputs of a layer, W_t = M W."""

from __future__ import annotations

from collections.abc import Sequence

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
    settings = ("normalise",)

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
        """The block of each group, `[groups, O / groups, O / groups]`."""
        return matrix.view(self.groups, matrix.shape[1], matrix.shape[1])

    def whole(self, dtype: torch.dtype) -> Tensor:
        """M as it multiplies, in blocks, differentiable."""
        matrix = self.matrix.to(dtype)
        if self.normalise:
            matrix = matrix * (self.gain.to(dtype) / matrix.norm(dim=1))[:, None]
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
            return (self.whole(wide) @ rows).reshape(weight.shape).to(weight.dtype)

    def operations(self, input: Tensor, output: Tensor) -> int:
        return 0 if self.owed else 2 * self.matrix.shape[1] * self.elements

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.owed or gate.known is False else self.elements * dtype.itemsize
