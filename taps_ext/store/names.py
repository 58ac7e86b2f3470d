"""Tasks' names as names of files."""

from __future__ import annotations

from urllib.parse import quote, unquote


def file_name(name: str) -> str:
    """A task's name as a file's, without an ending: any file system takes it, and different names stay different."""
    return quote(name, safe=" ()+,=@")


def name_of(file_name: str) -> str:
    """The name that :func:`file_name` made it of."""
    return unquote(file_name)
