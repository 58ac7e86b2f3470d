"""Pictures of tasks and runs: layers x tasks, curves, gates over time, accuracy against size, time and memory."""

from .curves import curves, gates
from .heatmap import heatmap
from .profile import profile_picture
from .tradeoff import Point, tradeoff

__all__ = ["Point", "curves", "gates", "heatmap", "profile_picture", "tradeoff"]
