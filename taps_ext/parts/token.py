"""A token that is another object after every change of what bindings are made from, in any model.

Gates, installed weights, modes and settings of routed modules change rarely and are read at every forward: who made
something of them keeps the token and looks again only when it is not the same any more.
"""

from __future__ import annotations

now: object = object()


def note() -> None:
    """Something has changed."""
    global now
    now = object()
