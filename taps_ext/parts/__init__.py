"""What a task puts over one module of the base."""

from .part import Part

__all__ = ["Part"]
