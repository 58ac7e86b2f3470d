"""Freed memory stays with the process: else a large result costs page faults in one call and none in the next."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc's allocator return nothing to the system, for as long as the process lives.

    Returns False where the C library has no such setting; times then hold page faults, and vary by them.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(set_option(_MMAP_MAX, 0)) and bool(set_option(_TRIM_THRESHOLD, -1))
