"""Comparisons of methods on data of one's own."""

from .compare import Comparison, compare, parse_methods

__all__ = ["Comparison", "compare", "parse_methods"]
