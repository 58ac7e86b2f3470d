"""Singular: a factor for each singular value of a layer's weight, W_t = U diag(s exp(a)) V^T."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .change import Change, register_change, without_autocast
from .gate import Gate
from .host import base_weight


@register_change("singular")
class Singular(Change):
    """`W_t = U diag(s exp(a)) V^T`, with `U diag(s) V^T` the singular value decomposition of W as a matrix `[N, K]` and
    a `[min(N, K)]`, zero at the start. Values stay positive, and zeros stay zero.

    It is computed as `W + U diag(s (exp(a) - 1)) V^T`, which starts as W to the bit. U, s and V are found anew from the
    weight below, in float64 on the CPU, and kept beside: no file holds them. Values that are equal to about 1e-9 of the
    largest have no axes of their own, so that another LAPACK may turn them among each other.
    """

    log_factor: nn.Parameter

    def __init__(self, host: nn.Module, *, held: bool = True) -> None:
        super().__init__(host, held=held)
        self.elements = base_weight(host).numel()
        self._kept: tuple[Any, Tensor, Tensor] | None = None

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {"log_factor": (min(len(weight), weight.shape[1:].numel()),)}

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.log_factor.dtype)  # double stays double
        scaled, right = self._axes(weight.detach())
        with without_autocast(weight):
            change = (scaled.to(wide) * torch.expm1(self.log_factor.to(wide))) @ right.to(wide)
        return (weight.to(wide) + change.view(weight.shape)).to(weight.dtype)

    @torch.compiler.disable
    def _axes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U diag(s) and V^T of a weight, kept as long as it is not written to."""
        if torch._C._are_functorch_transforms_active():
            return _decomposed(weight)
        version = -1 if weight.is_inference() else weight._version
        key = (weight.dtype, weakref.ref(weight.untyped_storage()), weight.storage_offset(), version)
        kept = self._kept
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = (key, *_decomposed(weight))
        return kept[1:]

    def operations(self, input: Tensor, output: Tensor) -> int:
        return 0 if self.owed else 2 * self.log_factor.numel() * self.elements

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.owed or gate.known is False else self.elements * dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has a weight of its own


def _decomposed(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.flatten(1).to("cpu", torch.float64)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (left * values).to(weight.device, wide), right.to(weight.device, wide)
