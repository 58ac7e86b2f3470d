"""Training: settings, tasks, the loop and its resumable state."""

from .config import TrainConfig
from .interrupt import TrainingInterrupted
from .metrics import whole
from .task import Task, accuracy
from .trainer import Result, Trainer

__all__ = ["Result", "Task", "TrainConfig", "Trainer", "TrainingInterrupted", "accuracy", "whole"]
