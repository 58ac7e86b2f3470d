"""Task adaptive parameter sharing for PyTorch (TAPS, arXiv 2203.16708)."""

__version__ = "0.1.0"
