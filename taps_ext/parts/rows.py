"""Rows: a factor for each output of a layer, W_t = diag(a) W."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .change import Change, register_change


@register_change("rows")
class Rows(Change):
    """`W_t = diag(a) W`, a `[N]` (of a convolution `[O]`), one at the start: the scale of a scale-and-bias patch (K for
    the Price of 1, arXiv 1810.10703) where no normalisation holds it."""

    role = "weight"  # decay would pull the factors to zero, not to one

    scale: nn.Parameter

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"scale": weight.shape[:1]}

    def start(self, weight: Tensor) -> None:
        self.scale.fill_(1.0)

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.scale.dtype)  # double stays double
        return (weight.to(wide) * self.scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
