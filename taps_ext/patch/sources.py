"""States to compare or to patch: live mappings, and checkpoints of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ConfigError
from ..store.errors import UnsupportedTensorError, show
from ..store.format import ALL_DTYPE_NAMES, check_name
from ..store.shards import Checkpoint, check_machine, opened
from ..store.tensors import check_storable
from . import kernels
from .format import Form
from .sums import state_digest


class Live(NamedTuple):
    """Tensors in memory."""

    path: str
    tensors: dict[str, Tensor]

    def forms(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (ALL_DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


Source = Checkpoint | Live


def live(tensors: Mapping[str, Any], where: str) -> Live:
    """Named tensors, checked and detached.

    Raises:
        UnsupportedTensorError, TensorNameError, LimitError: a value that is no dense tensor of bytes, a name that no
            file could hold.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        check_name(name, path=where)
        found[name] = check_storable(name, tensor, path=where, dtypes=ALL_DTYPE_NAMES)
        if tensor.is_conj() or tensor.is_neg():
            raise UnsupportedTensorError(where, f"tensor {show(name)}: expected one with its own bits, got a lazy view")
    return Live(where, found)


@contextmanager
def source(state: Any, where: str) -> Iterator[Source]:
    """A path or a mapping of tensors as a source."""
    check_machine()
    if isinstance(state, (str, os.PathLike)):
        with opened(state) as checkpoint:
            yield checkpoint
    elif isinstance(state, Mapping):
        yield live(state, where)
    else:
        raise ConfigError(f"{where}: expected a path or a mapping of names to tensors, got {type(state).__name__}")


def forms_of(state: Source) -> dict[str, Form]:
    """Every tensor with its sum: reads all of the state."""
    return {name: Form(*form, kernels.sum_of(state.read(name))) for name, form in state.forms().items()}


def digest_of(forms: Mapping[str, Form]) -> str:
    """The state's digest."""
    return state_digest((name, *form) for name, form in forms.items())
