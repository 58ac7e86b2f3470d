"""Record: what a file holds of one part of a task, as facts and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import TaskFileError
from .compare import check_tensors
from .errors import MetadataError, MissingTensorError, Path, UnexpectedTensorError, show

_T = TypeVar("_T")


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

    def refuse_tensor(self, name: str, problem: str, kind: type[TaskFileError]) -> TaskFileError:
        """The error for a tensor that is not as it should be."""
        return kind(self.path, f"tensor {show(self.full(name))}: {problem}")

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
            raise self.refuse(f"{unknown[0]}: expected none but {', '.join(names)}")

    def take(self, expected: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Tensor]:
        """These tensors, each of its shape and type.

        Raises:
            MissingTensorError, ShapeMismatchError, DtypeMismatchError: naming the first that is not so.
        """
        found = {name: tensor for name, tensor in self.tensors.items() if name in expected}
        if self.cast:
            for name, tensor in found.items():
                wanted = expected[name][1]
                if tensor.is_floating_point() and wanted.is_floating_point:
                    found[name] = tensor.to(wanted)
        check_tensors(
            {self.full(name): wanted for name, wanted in expected.items()},
            {self.full(name): tensor for name, tensor in found.items()},
            path=self.path,
        )
        self.taken |= expected.keys()
        return found

    def check_taken(self) -> None:
        """Raise UnexpectedTensorError where a tensor was not taken, naming it."""
        left = sorted(self.tensors.keys() - self.taken)
        if left:
            raise UnexpectedTensorError(self.path, f"tensor {show(self.full(left[0]))}: the model has no place for it")
