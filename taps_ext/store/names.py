"""Tasks' names as names of files."""

from __future__ import annotations

from urllib.parse import quote, unquote

SHARED = "%shared-"
"""How a file of shared weights begins, and no quoted name."""


def file_name(name: str) -> str:
    """A task's name as a file's, without an ending: any file system takes it, and different names stay different."""
    return quote(name, safe=" ()+,=@")


def name_of(file_name: str) -> str:
    """The name that :func:`file_name` made it of."""
    return unquote(file_name)


def shared_file_name(digest: str) -> str:
    """The same of weights that tasks share, which are known by their file's digest: no task's file is called so."""
    return f"{SHARED}{digest.partition(':')[2]}"
