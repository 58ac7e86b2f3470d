"""Tasks' names as names of files."""

from __future__ import annotations

import hashlib
from urllib.parse import quote, unquote

SHARED = "%shared-"
"""How a file of shared weights begins, and no quoted name."""


LONG = "%long-"
"""What stands before the digest of a name that is too long for a file's, and in no quoted name."""

_LONGEST = 255  # bytes of a file's name on ext4, APFS and NTFS, and on most others


def file_name(name: str, ending: str = "") -> str:
    """A task's name as a file's, with this ending, in at most 255 ASCII characters; different names stay different.

    A name whose quoted form is longer is cut, and its SHA-256 tells it from others. Names that differ in case alone are
    two files where the file system tells upper from lower case, and one where it does not (APFS and NTFS as they come).
    """
    quoted = quote(name, safe=" ()+,=@")
    if len(quoted) + len(ending) <= _LONGEST:
        return quoted + ending
    end = f"{LONG}{hashlib.sha256(name.encode()).hexdigest()}{ending}"
    return quoted[: _LONGEST - len(end)] + end


def name_of(file_name: str) -> str | None:
    """The name that :func:`file_name` made it of, given without the ending; None for one that was cut."""
    return None if LONG in file_name else unquote(file_name)


def shared_file_name(digest: str) -> str:
    """The same of weights that tasks share, which are known by their file's digest: no task's file is called so."""
    return f"{SHARED}{digest.partition(':')[2]}"
