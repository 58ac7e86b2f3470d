"""The lossless sparse difference of two states, and its application, all or nothing. Needs no model.

    patch.diff("old.safetensors", "new.safetensors", out="step-2.tapspatch")
    patch.apply("old.safetensors", "step-2.tapspatch")          # or a folder of shards, or model.state_dict()

docs/patch.md says how a patch is stored and what is proven.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..store.shards import check_machine
from .applying import VERIFY, Applied, State, apply_live, as_chain, as_patch, placing
from .errors import (
    AlreadyAppliedError,
    BaseMismatchError,
    ChainOrderError,
    IndexCodeError,
    IndexRangeError,
    IndexTwiceError,
    LinkedShardError,
    OtherTensorsError,
    SharedMemoryError,
)
from .format import Entry, Form, Part, Patch, load, parse
from .making import compose, diff, digest
from .rewriting import apply_files

__all__ = [
    "AlreadyAppliedError",
    "Applied",
    "BaseMismatchError",
    "ChainOrderError",
    "Entry",
    "Form",
    "IndexCodeError",
    "IndexRangeError",
    "IndexTwiceError",
    "LinkedShardError",
    "OtherTensorsError",
    "Part",
    "Patch",
    "SharedMemoryError",
    "State",
    "apply",
    "compose",
    "diff",
    "digest",
    "load",
    "parse",
]


def apply(
    target: str | os.PathLike[str] | Mapping[str, Tensor] | State,
    patch: Patch | str | os.PathLike[str] | Sequence[Patch | str | os.PathLike[str]],
    *,
    verify: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Applied:
    """Bring a state from where the patch begins to where it ends, bit for bit, or leave it as it is.

    Args:
        target: named tensors in memory, written in place; a `State` of them, which knows its digest; or a safetensors
            file, a folder of them or an index, replaced.
        patch: a patch or its file; or several that follow each other, which are applied as one.
        verify: "touched" proves of the state before that each element that is to be replaced is what it was, by a sum
            over them, for a cost in proportion to what changes; a `State` proves its own digest with it. "full" proves
            the digest of the whole state before (of files: of what is written). Default: "full" for files, which are
            read and written anyway, else "touched".
        out: where to write the patched checkpoint instead: a file, or for several files a new folder.

    Whatever can be wrong is found before the first element is written; in tensors in memory, what is replaced is proven
    while it is written over, and put back to the bit if it is not what it must be or if anything stops the writing. The
    state after is proven by arithmetic: its sums are those before, minus what is replaced, plus what is written.

    Raises:
        AlreadyAppliedError, BaseMismatchError: the state is the one that the patch ends at, or yet another one; for
            several patches with the state's digest, and the one to go on from if it stands among them.
        MissingTensorError, UnexpectedTensorError, ShapeMismatchError, DtypeMismatchError: it has other tensors.
        OtherTensorsError: the patch adds, removes or reshapes tensors, and the target is no single file.
        ChainOrderError: patches that do not follow each other.
        SharedMemoryError: tensors in memory overlap otherwise than wholly and with one future.
        TaskFileError: whatever else is wrong with a file. ConfigError: with an argument.
    """
    check_machine()
    files = isinstance(target, (str, os.PathLike))
    chosen = verify if verify is not None else "full" if files else "touched"
    if chosen not in VERIFY:
        raise ConfigError(f"verify: expected one of {', '.join(VERIFY)}, got {chosen!r}")
    chain = as_chain(patch)
    one = as_patch(chain)
    if isinstance(target, (str, os.PathLike)):
        with placing(target, chain):
            return apply_files(target, one, chosen, out)
    if out is not None:
        raise ConfigError("out: expected none for tensors in memory, which are written in place")
    if not isinstance(target, (Mapping, State)):
        got: Any = type(target).__name__
        raise ConfigError(f"target: expected a path, a mapping of names to tensors or a State, got {got}")
    with placing(target.tensors if isinstance(target, State) else target, chain):
        return apply_live(target, one, chosen)
