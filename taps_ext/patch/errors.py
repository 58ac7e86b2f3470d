"""Ways in which a patch is refused that other files of the package do not have, one class each."""

from __future__ import annotations

from ..errors import TaskFileError


class IndexCodeError(TaskFileError):
    """The numbers of changed elements end within a gap, or are more or fewer than there are values."""


class IndexRangeError(TaskFileError):
    """A changed element's number is not one of its tensor's."""


class IndexTwiceError(TaskFileError):
    """An element is changed twice."""


class BaseMismatchError(TaskFileError):
    """What is to be patched is not the state that the patch begins at."""


class AlreadyAppliedError(BaseMismatchError):
    """What is to be patched is the state that the patch ends at."""


class ChainOrderError(TaskFileError):
    """In a chain, a patch does not begin where the one before it ends."""


class OtherTensorsError(TaskFileError):
    """A patch adds, removes or reshapes tensors, which what is to be patched cannot take."""


class LinkedShardError(TaskFileError):
    """A checkpoint of several files has a link among them, which cannot be replaced together with the others."""


class SharedMemoryError(TaskFileError):
    """Tensors of a live state share memory in a way in which the result could not be the patch's."""
