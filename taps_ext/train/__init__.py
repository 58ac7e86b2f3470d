"""Training: settings, tasks, the loop and its resumable state."""

from .config import TrainConfig
from .task import Task, accuracy
from .trainer import Result, Trainer, TrainingInterrupted

__all__ = ["Result", "Task", "TrainConfig", "Trainer", "TrainingInterrupted", "accuracy"]
