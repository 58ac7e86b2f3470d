"""Fine-tuning: every parameter and buffer of the model becomes the task's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..base.scan import Scan
from ..parts import Dense, Gate, Layer, Part
from .base import MethodConfig, register_method


def trained_layers(base: Scan, names: Collection[str]) -> dict[str, Part]:
    """An open Delta and a bias of its own for each of these layers, in module order."""
    return {
        name: Layer(Gate(learn=False), Dense(host), bias=base.bias(name, host))
        for name, host in base.weights.items()
        if name in names
    }


@register_method("full")
@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Settings of full fine-tuning: all gates fixed open; norms, biases and all other tensors the task's own."""

    def parts(self, base: Scan) -> dict[str, Part]:
        """Every layer open, every norm and every other tensor of the base."""
        return {**trained_layers(base, base.weights), **base.own(base.norms), **base.own(base.others)}
