"""TaskModel: a frozen base, the tasks beside it, and their reports."""

from .fold import Folded, fold_norms
from .packing import PackedRow, Packing
from .report import Report, Row
from .resolution import ByResolution
from .task_model import TaskModel

__all__ = ["ByResolution", "Folded", "PackedRow", "Packing", "Report", "Row", "TaskModel", "fold_norms"]
