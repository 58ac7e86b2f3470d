"""The reused buffer that task weights are rebuilt into."""

from __future__ import annotations

from .ops import _C


def workspace_bytes() -> int:
    """Bytes held in the CPU's workspaces: at most the largest gated weight for each host thread that uses one at the
    same time. A GPU's comes from torch's allocator for as long as a call takes."""
    return 0 if _C is None else int(_C.workspace_bytes())
