"""Pictures of tasks and runs: layers x tasks, learning curves, gates over time, accuracy against size."""

from .curves import curves, gates
from .heatmap import heatmap
from .tradeoff import tradeoff

__all__ = ["curves", "gates", "heatmap", "tradeoff"]
