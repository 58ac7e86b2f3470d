"""Strict comparison of what a model expects with what a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors import (
    DtypeMismatchError,
    MissingTensorError,
    ParentMismatchError,
    Path,
    ShapeMismatchError,
    UnexpectedTensorError,
    show,
)


def check_tensors(
    expected: Mapping[str, tuple[Sequence[int], torch.dtype]], got: Mapping[str, Tensor], *, path: Path
) -> None:
    """Raises unless `got` has exactly the expected names, each with the expected shape and dtype.

    `expected` is name -> (shape, dtype). Raises MissingTensorError, UnexpectedTensorError, ShapeMismatchError
    or DtypeMismatchError, naming the first such tensor in sorted order and how many more there are.
    """
    missing = sorted(expected.keys() - got.keys())
    if missing:
        shape, dtype = expected[missing[0]]
        raise MissingTensorError(
            path,
            f"tensor {show(missing[0])}: expected {dtype} of shape {list(shape)}, got none{_more(missing)}",
        )
    extra = sorted(got.keys() - expected.keys())
    if extra:
        raise UnexpectedTensorError(path, f"tensor {show(extra[0])}: the model has no place for it{_more(extra)}")
    for name in sorted(expected):
        shape, dtype = expected[name]
        tensor = got[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ShapeMismatchError(
                path, f"tensor {show(name)}: expected shape {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise DtypeMismatchError(path, f"tensor {show(name)}: expected {dtype}, got {tensor.dtype}")


PARENT_ADVICE = (
    "load the architecture and weights that it was trained on, in that type (allow_dtype_cast=True where the base was "
    "cast since), or, where tasks were trained together, put their shared file beside it (or name that in shared=)"
)
"""What to do about another parent, in Python's words; the command line has its own."""


def check_parent(expected: str, got: str, *, path: Path, hint: str = "") -> None:
    """Raises ParentMismatchError unless the parent that the file names (`got`) is the one at hand
    (`expected`). `hint`: what may be the matter beside.
    """
    if expected != got:
        raise ParentMismatchError(
            path,
            f"belongs to another base (or shared file): {show(got)}, and this one is {expected}; {PARENT_ADVICE}{hint}",
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
