"""Drop-in layers: torch's linear and convolution layers with a gated Delta, for use without a TaskModel."""

from .convert import convert, revert, sparsity_loss
from .layers import TapsConv2d, TapsLinear

__all__ = ["TapsConv2d", "TapsLinear", "convert", "revert", "sparsity_loss"]
