"""Record: what a file holds of one part of a task, as facts and tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import TaskFileError
from .compare import check_tensors
from .errors import MetadataError, MissingTensorError, Path, TensorValueError, UnexpectedTensorError, show
from .format import TensorInfo
from .tensors import Later, Source

_T = TypeVar("_T")


class OnDisk(Mapping[str, Tensor]):
    """A part's tensors in a file that is open: each is read, and proven, where it is asked for.

    Args:
        infos: by name within the part. read: gives one.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
        self.infos, self.read = infos, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.infos:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


@dataclass(eq=False)
class Record:
    """One part of a task.

    Attributes:
        facts: a JSON object; "kind" is the part's kind. tensors: by name within the part.
        module: the base module's name. path: the file, for messages.
        cast: whether floating-point tensors may be taken in another floating-point type than they are stored in.
    """

    facts: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    module: str = ""
    path: Path = ""
    cast: bool = False
    taken: set[str] = field(default_factory=set)

    def full(self, name: str) -> str:
        """A tensor's name with the module's."""
        return f"{self.module}.{name}" if self.module else name

    def refuse(self, problem: str, kind: type[TaskFileError] = MetadataError) -> TaskFileError:
        """The error for a record that cannot be read."""
        return kind(self.path, f"part {show(self.module)}: {problem}")

    def missing(self, name: str, problem: str) -> MissingTensorError:
        """The error for a tensor that is not there, or not as it should be."""
        return MissingTensorError(self.path, f"tensor {show(self.full(name))}: {problem}")

    def fact(self, name: str, kind: type[_T]) -> _T:
        """A fact of this type. Raises MetadataError where there is none."""
        value = self.facts.get(name)
        if type(value) is not kind:
            raise self.refuse(f"{name}: expected a {kind.__name__}, got {show(value)}")
        return value

    def only(self, *names: str) -> None:
        """Raise MetadataError unless all facts beside "kind" are among these: one that is not understood is not
        ignored."""
        unknown = sorted(self.facts.keys() - {"kind", *names})
        if unknown:
            raise self.refuse(f"{show(unknown[0])}: expected none but {', '.join(names)}")

    def like(self, name: str) -> Tensor:
        """A tensor of which shape and type count: one in a file is not read for it."""
        if not isinstance(self.tensors, OnDisk):
            return self.tensors[name]
        info = self.tensors.infos[name]
        return torch.empty(info.shape, dtype=info.torch_dtype, device="meta")

    def source(self, name: str) -> Source:
        """A tensor to be written, which one in a file is read for when its turn comes."""
        if not isinstance(self.tensors, OnDisk):
            return self.tensors[name]
        info, tensors = self.tensors.infos[name], self.tensors
        return Later(info.torch_dtype, info.shape, lambda: tensors[name])

    def likes(self) -> dict[str, Tensor]:
        """All tensors, as :meth:`like` has them."""
        return {name: self.like(name) for name in self.tensors}

    def take(
        self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]], *, free: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """These tensors, each of its shape and type, of finite values but for those in `free`. Shapes and types are
        compared before a file is read on.

        Raises:
            MissingTensorError, ShapeMismatchError, DtypeMismatchError, TensorValueError: the first that is not so.
        """
        likes = {name: self.like(name) for name in self.tensors if name in expected}
        casts = [
            name
            for name, like in likes.items()
            if self.cast and like.is_floating_point() and expected[name][1].is_floating_point
        ]
        check_tensors(
            {self.full(name): wanted for name, wanted in expected.items()},
            {self.full(n): like.to(expected[n][1]) if n in casts else like for n, like in likes.items()},
            path=self.path,
        )
        self.taken |= expected.keys()
        found = {name: self.tensors[name] for name in likes}
        if (wrong := not_finite({name: tensor for name, tensor in found.items() if name not in free})) is not None:
            raise self.refuse_tensor(wrong, "expected finite values, got Inf or NaN")
        return {name: tensor.to(expected[name][1]) if name in casts else tensor for name, tensor in found.items()}

    def refuse_tensor(self, name: str, problem: str, kind: type[TaskFileError] = TensorValueError) -> TaskFileError:
        """The error for a tensor whose values no task has."""
        return kind(self.path, f"tensor {show(self.full(name))}: {problem}")

    def check_taken(self) -> None:
        """Raise UnexpectedTensorError where a tensor was not taken, naming it."""
        left = sorted(self.tensors.keys() - self.taken)
        if left:
            raise UnexpectedTensorError(self.path, f"tensor {show(self.full(left[0]))}: the model has no place for it")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first of these tensors, by name, that holds Inf or NaN; float8 has values that torch cannot ask for."""
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor).all()):
            return name
    return None
