"""The reused buffer that task weights are rebuilt into, and the limit on it."""

from __future__ import annotations

import operator

from .errors import ConfigError
from .ops import _C


def workspace_bytes() -> int:
    """Bytes held in the CPU's workspaces: at most the largest gated weight for each host thread that uses one at the
    same time. A GPU's comes from torch's allocator for as long as a call takes."""
    return 0 if _C is None else int(_C.workspace_bytes())


def workspace_limit() -> int | None:
    """The limit set by :func:`set_workspace_limit`, or None."""
    return (None if _C is None else int(_C.workspace_limit())) or None


def set_workspace_limit(limit: int | None) -> None:
    """Rebuild no more than `limit` bytes of a task's weight at a time, in this process; None for no limit.

    A layer that would pack more of its input than that, to be fused, is rebuilt. Open layers above the limit work in
    panels of output channels (at least two; never less than a group of a grouped convolution unless it can be cut
    itself). That costs a few per cent of time in those layers. Sums run in another order, so outputs and gradients may
    differ in the last bits from those without a limit. Layers whose gate the host knows to be closed stay whole and are
    bit-equal to the base, in outputs and in their input's gradient.

    Raises:
        ConfigError: a limit that is not a positive integer; a limit without the compiled extension.
    """
    if limit is not None and (isinstance(limit, bool) or not hasattr(limit, "__index__") or not 0 < limit < 2**63):
        raise ConfigError(f"limit: expected a positive int, of bytes, or None, got {limit!r}")
    if _C is not None:
        _C.set_workspace_limit(0 if limit is None else operator.index(limit))
    elif limit is not None:
        raise ConfigError("limit: expected the compiled extension, which owns the workspace; it is not loaded")
