"""Training: settings, tasks, the loop and its resumable state."""

from .config import TrainConfig
from .interrupt import TrainingInterrupted
from .task import Task, accuracy
from .tokens import token_accuracy, token_cross_entropy
from .trainer import Result, Trainer

__all__ = [
    "Result",
    "Task",
    "TrainConfig",
    "Trainer",
    "TrainingInterrupted",
    "accuracy",
    "token_accuracy",
    "token_cross_entropy",
]
