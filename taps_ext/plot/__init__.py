"""Pictures of tasks and runs: layers x tasks, curves, gates over time, accuracy against size, time and memory."""

from .curves import curves, gates
from .heatmap import heatmap
from .profile import profile_picture
from .tradeoff import tradeoff

__all__ = ["curves", "gates", "heatmap", "profile_picture", "tradeoff"]
