"""Precision of forwards: autocast and, for fp16, the scale of the loss that keeps small gradients from being zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOOR = 1.0
"""The smallest scale. It stays there: gradients that are not finite without a scale are not the scale's doing."""


def autocast(amp: str | None, device: torch.device) -> torch.autocast:
    """As `TrainConfig.amp` says."""
    return torch.autocast(device.type, TYPES.get(amp or "", torch.bfloat16), enabled=amp is not None)


class Scaler:
    """The scale of losses under amp="fp16" (`torch.amp.GradScaler`); with other settings it does nothing.

    A step whose gradients are not finite, while the scale is above :data:`FLOOR`, halves it and is left out in silence:
    so the scale finds its place, also after every growth of it.

    Raises:
        ConfigError: parameters of float16, whose gradients cannot be unscaled.
    """

    def __init__(self, amp: str | None, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.inner = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.unscaled = False
        if self.enabled and any(p.dtype == torch.float16 for g in optimizer.param_groups for p in g["params"]):
            raise ConfigError('amp: expected trained parameters of float32 with "fp16", got float16; use model.float()')

    @property
    def enabled(self) -> bool:
        return bool(self.inner.is_enabled())

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call backward of."""
        scaled: Tensor = self.inner.scale(loss)
        return scaled

    def unscale(self) -> None:
        """Take the scale off the gradients, before they are looked at or clipped."""
        self.unscaled = self.enabled and any(
            p.grad is not None for group in self.optimizer.param_groups for p in group["params"]
        )
        if self.unscaled:
            self.inner.unscale_(self.optimizer)

    def backed_off(self) -> bool:
        """Halve the scale after gradients that are not finite; False where that is no way out."""
        if not self.unscaled:
            return False
        if self.inner.get_scale() <= FLOOR:
            self.inner.update(FLOOR)
            return False
        self.inner.update()
        return True

    def update(self) -> None:
        """After a step that was taken: the scale doubles after 2000 such in a row."""
        if self.unscaled:
            self.inner.update()

    def state(self) -> dict[str, Any]:
        """JSON-ready; empty where there is no scale."""
        return dict(self.inner.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.inner.load_state_dict(state)
