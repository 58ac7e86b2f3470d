"""Data sources for training, the command line and the demo; see `open_source`."""

from ..errors import SourceError
from .registry import known_sources, open_source
from .source import ArrayDataset, NormalizedDataset, SizedDataset, Source

__all__ = [
    "ArrayDataset",
    "NormalizedDataset",
    "SizedDataset",
    "Source",
    "SourceError",
    "known_sources",
    "open_source",
]
