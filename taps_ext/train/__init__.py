"""Training: settings, tasks, the loop and its resumable state."""

from .callbacks import Callback, RunInfo
from .config import TrainConfig
from .interrupt import TrainingInterrupted
from .metrics import whole
from .multitask import MultiTask
from .result import Result
from .task import Task, accuracy
from .tokens import token_accuracy, token_cross_entropy
from .trainer import Trainer
from .weighting import Uncertainty, Weighting, register_weighting

__all__ = [
    "Callback",
    "MultiTask",
    "Result",
    "RunInfo",
    "Task",
    "TrainConfig",
    "Trainer",
    "TrainingInterrupted",
    "Uncertainty",
    "Weighting",
    "accuracy",
    "register_weighting",
    "token_accuracy",
    "token_cross_entropy",
    "whole",
]
