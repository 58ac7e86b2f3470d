"""Dense prediction: feature taps of any backbone, decoders, losses and metrics of maps (docs/dense.md)."""

from .base import DenseBase
from .decoders import ConcatDecoder, Decoder, LightDecoder, MapHead
from .labels import boundaries, distance
from .losses import BalancedLoss, NormalsLoss, SegmentationLoss, ValueLoss
from .metrics import RMSE, BoundaryF, MeanAngle, MeanIoU, delta_m
from .taps import Tap, find_taps

__all__ = [
    "RMSE",
    "BalancedLoss",
    "BoundaryF",
    "ConcatDecoder",
    "Decoder",
    "DenseBase",
    "LightDecoder",
    "MapHead",
    "MeanAngle",
    "MeanIoU",
    "NormalsLoss",
    "SegmentationLoss",
    "Tap",
    "ValueLoss",
    "boundaries",
    "delta_m",
    "distance",
    "find_taps",
]
