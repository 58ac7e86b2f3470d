"""Residual adapters as weights: 1 x 1 convolutions beside a convolution, or behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .change import Change, register_change, without_autocast
from .gate import Gate
from .host import base_weight


@register_change("parallel-adapter")
class ParallelAdapter(Change):
    """`W_t = W` with A `[O, C]` added in the middle of its kernel, zero at the start (arXiv 1803.10082).

    With a padding of `dilation * (k // 2)` that is a 1 x 1 convolution of the same stride beside the layer,
    `y = W * x + A * x`; with another one A sees the pixel in the middle of each window. It costs no product.

    Raises:
        ValueError: a host that is no ungrouped 2-d convolution of odd kernel sizes.
    """

    adapter: nn.Parameter

    def __init__(self, host: nn.Module, *, held: bool = True) -> None:
        if not (isinstance(host, nn.Conv2d) and host.groups == 1 and all(size % 2 for size in host.kernel_size)):
            raise ValueError(f"host: expected an ungrouped Conv2d of odd kernel sizes, got {host}")
        super().__init__(host, held=held)

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"adapter": weight.shape[:2]}

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.adapter.dtype)  # double stays double
        above, beside = weight.shape[2] // 2, weight.shape[3] // 2
        change = F.pad(self.adapter.to(wide)[:, :, None, None], (beside, beside, above, above))
        return (weight.to(wide) + change).to(weight.dtype)

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.owed or gate.known is False else base_weight(host).numel() * dtype.itemsize


@register_change("series-adapter")
class SeriesAdapter(Change):
    """`W_t = (I + A) W` and the same of the bias, A `[O, O]` being zero at the start: `y = z + A z` behind an ungrouped
    layer that gives z (arXiv 1705.08045).

    Raises:
        ValueError: a host with groups.
    """

    adapter: nn.Parameter

    def __init__(self, host: nn.Module, *, held: bool = True) -> None:
        if getattr(host, "groups", 1) != 1:
            raise ValueError(f"host: expected a layer without groups, got {host}")
        super().__init__(host, held=held)
        self.elements = base_weight(host).numel()

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"adapter": (len(weight), len(weight))}

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.adapter.dtype)  # double stays double
        rows = weight.to(wide).flatten(1)
        with without_autocast(weight):
            return (rows + self.adapter.to(wide) @ rows).view(weight.shape).to(weight.dtype)

    def bias_over(self, bias: Tensor, gate: Gate) -> Tensor:
        return bias if gate.shut or self.owed else gate.select(self.fold(bias[:, None])[:, 0], bias)

    def operations(self, input: Tensor, output: Tensor) -> int:
        return 0 if self.owed else 2 * self.adapter.shape[1] * self.elements

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.owed or gate.known is False else self.elements * dtype.itemsize
