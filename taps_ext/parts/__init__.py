"""What a task puts over one module of the base."""

from .part import Bound, Part

__all__ = ["Bound", "Part"]
