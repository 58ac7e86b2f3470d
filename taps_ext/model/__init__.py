"""TaskModel: a frozen base, the tasks beside it, and their reports."""

from ..files.pack import PackedRow, Packing
from .fold import Folded, fold_norms
from .mixed import MixedOutput
from .report import Report, Row
from .resolution import ByResolution
from .task_model import TaskModel

__all__ = ["ByResolution", "Folded", "MixedOutput", "PackedRow", "Packing", "Report", "Row", "TaskModel", "fold_norms"]
