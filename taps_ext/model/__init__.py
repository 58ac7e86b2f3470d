"""TaskModel: a frozen base, the tasks beside it, and their reports."""

from .report import Report, Row
from .task_model import TaskModel

__all__ = ["Report", "Row", "TaskModel"]
