"""Every way in which a task file is refused, one class each.

All are `TaskFileError`, hence `TapsError` and `ValueError`: a caller that only wants one line for the user catches
one of those. Text that was taken from the file goes through `show`, so that a hostile name can neither flood nor steer
a terminal.
"""

from __future__ import annotations

import os

from ..errors import TaskFileError

Path = str | os.PathLike[str]


def show(value: object, limit: int = 96) -> str:
    """`repr(value)` cut to `limit` characters."""
    if isinstance(value, (str, bytes)) and len(value) > limit:
        return repr(value[:limit]) + "..."
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


class MissingFileError(TaskFileError, FileNotFoundError):
    """There is no such file, or no folder to write it in."""


class NotRegularFileError(TaskFileError):
    """The path is a folder, a pipe, a device or a socket."""


class TruncatedFileError(TaskFileError):
    """The file ends before the bytes that its header promises."""


class LimitError(TaskFileError):
    """A size that no honest task file reaches: header, tensor count, name length, rank, element count,
    nesting.
    """


class HeaderError(TaskFileError):
    """The header is not the JSON that the safetensors format prescribes."""


class DuplicateKeyError(HeaderError):
    """A JSON object names one key twice."""


class LayoutError(TaskFileError):
    """Tensor bytes overlap, leave a hole, disagree with dtype and shape, or do not reach the end of the
    file.
    """


class TensorNameError(TaskFileError):
    """A tensor or module name is empty or holds unprintable characters."""


class UnknownDtypeError(TaskFileError):
    """The file holds a dtype that this format does not have."""


class UnsupportedTensorError(TaskFileError):
    """A tensor cannot be stored or fingerprinted: sparse, quantised, complex, meta, uninitialised,
    sharded.
    """


class MetadataError(TaskFileError):
    """A `taps.*` entry is absent, or its content is not what that entry must hold."""


class UnknownKeyError(MetadataError):
    """A `taps.*` entry that this version does not know, so could not honour."""


class FormatVersionError(MetadataError):
    """The file's format has another major version."""


class KindError(MetadataError):
    """The file is of a kind that this version does not know, or not of the one asked for."""


class CodecError(TaskFileError):
    """A file of 1.0 or 1.1 names an unknown codec, or none for an open layer."""


class GateRecordError(TaskFileError):
    """What a file records of a part's gate is impossible: gate, score and change contradict each other, or the score is
    not a finite number.
    """


class PackedTensorError(TaskFileError):
    """Codes, bits or scales of a packed change that no packing gives."""


class DigestError(TaskFileError):
    """Bytes are not those that were written, or a digest is missing or belongs to nothing."""


class ParentMismatchError(TaskFileError):
    """The file was trained on another base (or shared file)."""


class MissingTensorError(TaskFileError):
    """An expected tensor is absent."""


class UnexpectedTensorError(TaskFileError):
    """A tensor that nothing asks for is present."""


class ShapeMismatchError(TaskFileError):
    """A tensor has another shape than expected."""


class DtypeMismatchError(TaskFileError):
    """A tensor has another dtype than expected."""


class TensorValueError(TaskFileError):
    """A tensor holds values that no trained task has: Inf, NaN, a negative variance."""


class BadPathError(TaskFileError):
    """A path that leads to no file: too long, with a NUL character, a loop of links."""
