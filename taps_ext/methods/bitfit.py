"""BitFit (arXiv 2106.10199): a task's own biases."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.scan import Scan
from ..parts import Gate, Layer, Part
from .base import MethodConfig, register_method


def _is_bias(name: str) -> bool:
    """True for a parameter's name that says so: "bias", "q_bias" of attentions, "bias_ih_l0" of recurrent layers."""
    return name.startswith("bias") or name.endswith("_bias")


@register_method("bitfit")
@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """Settings of BitFit: all biases of the base and nothing else, but for the head.

    Biases of layers, of norms, and of other modules whose parameters are called `bias` or `..._bias`. Running
    statistics stay the base's, whose norms are in evaluation mode.
    """

    def parts(self, base: Scan) -> dict[str, Part]:
        """A bias over every module that has one."""
        layers: dict[str, Part] = {
            name: Layer(Gate(learn=False, open=False), None, bias=bias)
            for name, host in base.weights.items()
            if (bias := base.bias(name, host)) is not None
        }
        return {**layers, **base.own({**base.norms, **base.others}, buffers=False, only=_is_bias)}
