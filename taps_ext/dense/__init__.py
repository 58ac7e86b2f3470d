"""Dense prediction: feature taps of any backbone, decoders, losses and metrics of maps (docs/dense.md)."""

from .base import DenseBase
from .decoders import ConcatDecoder, Decoder, LightDecoder, MapHead
from .taps import Tap, find_taps

__all__ = ["ConcatDecoder", "Decoder", "DenseBase", "LightDecoder", "MapHead", "Tap", "find_taps"]
