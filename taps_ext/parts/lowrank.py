"""LowRank: W + scale * B A, the change of LoRA (arXiv 2106.09685), computed beside the product below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import mixed_lowrank
from .change import Change, register_change
from .gate import Gate
from .host import base_weight, resting_weight

if TYPE_CHECKING:
    from .part import Below


@register_change("lowrank")
class LowRank(Change):
    """`W_t = W + scale * B A`, with W as a matrix `[N, K]` (of a convolution `[O, C / groups * kh * kw]`).

    A `[rank, K]` starts as nn.Linear's weights do (Kaiming uniform with a = sqrt 5), B `[N, rank]` at zero, so that W_t
    starts as W. The product below runs once: `y = below(x) + scale * B (A x)`; of a convolution A is one of the same
    geometry with `rank` outputs and B a 1 x 1 behind it. Grouped convolutions and weights that are read get W_t as a
    tensor.

    Args:
        rank: 1 or more. scale: a finite number.

    Raises:
        ValueError: another rank or scale.
    """

    settings: ClassVar[tuple[str, ...]] = ("rank", "scale")

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, host: nn.Module, *, rank: int, scale: float = 1.0, held: bool = True) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an int >= 1, got {rank!r}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale!r}")
        self.rank, self.scale = rank, float(scale)
        super().__init__(host, held=held)

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"down": (self.rank, weight[0].numel()), "up": (len(weight), self.rank)}

    def start(self, weight: Tensor) -> None:
        bound = 1.0 / math.sqrt(max(1, self.down.shape[1]))
        self.down.uniform_(-bound, bound)

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.up.dtype)  # double stays double
        change = self.scale * (self.up.to(wide) @ self.down.to(wide)).view(weight.shape)
        return (weight.to(wide) + change).to(weight.dtype)

    def added(self, weight: Tensor) -> Tensor | None:
        return (self.scale * (self.up @ self.down)).view(weight.shape)

    def product(self, below: Below, input: Tensor, gate: Gate, bias: Tensor | None) -> Tensor:
        host = below.host
        if isinstance(host, nn.Conv2d) and (host.groups != 1 or host.padding_mode != "zeros"):
            return super().product(below, input, gate, bias)
        closed = below.product(input, bias)
        if self.owed or gate.shut:  # where it is owed B is zero: nothing is added, and the score's gradient is zero
            return closed
        return gate.select(closed + self.beside(host, self.seen(input)), closed)

    def seen(self, input: Tensor) -> Tensor:
        """What A is given of a layer's input."""
        return input

    def beside(self, host: nn.Module, input: Tensor) -> Tensor:
        """`scale * B (A x)`, of a linear layer or a convolution without groups."""
        down, up = (factor.to(input.dtype) for factor in (self.down, self.up))
        if isinstance(host, nn.Conv2d):
            conv: Any = (host.stride, host.padding, host.dilation)
            small = F.conv2d(input, down.view(-1, *base_weight(host).shape[1:]), None, *conv)
            return self.scale * F.conv2d(small, up[:, :, None, None])
        return self.scale * F.linear(F.linear(input, down), up)

    forward = product

    @classmethod
    def mixed(
        cls,
        changes: Sequence[tuple[Change, Gate] | None],
        host: nn.Module,
        input: Tensor,
        bias: Tensor | None,
        ids: Tensor,
    ) -> Tensor | None:
        """The base's product once, and one call for what all tasks add."""
        found: list[Any] = [None if pair is None else pair[0] for pair in changes]
        if not isinstance(host, nn.Linear) or any(change is not None and change.owed for change in found):
            return None
        if any(pair is not None and (pair[1].known is not True or pair[1].learns) for pair in changes):
            return None  # a score learns from the difference that its gate makes
        factors = {
            name: [None if change is None else change._parameters[name].to(input.dtype) for change in found]
            for name in ("down", "up")
        }
        scales = [0.0 if change is None else change.scale for change in found]
        weight = resting_weight(host, base_weight(host), input)
        added = mixed_lowrank(input, factors["down"], factors["up"], ids, scales)
        return F.linear(input, weight, bias) + added

    def operations(self, input: Tensor, output: Tensor) -> int:
        if self.owed:
            return 0
        rows = output.numel() // max(1, self.up.shape[0])
        return 2 * rows * self.rank * (self.down.shape[1] + self.up.shape[0])
