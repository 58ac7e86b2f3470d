"""What a task's file says beside its tensors: labels, how images become inputs, and so what an input must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import store
from ..files.images import Geometry, geometry_of, stored
from .errors import InputError


@dataclass(frozen=True)
class Facts:
    """Of one state of a task, or of the base.

    Attributes:
        task: its name in the folder; None is the base. digest: of its file. method: the method's name.
        labels: class names, or None. geometry: how its images are made, or None where the file says nothing.
        map: the kind of the maps that it makes of images, or None.
        shape, dtype: of one sample, without a dimension for the batch; None where nothing is known.
    """

    task: str | None
    digest: str = ""
    method: str = ""
    labels: tuple[str, ...] | None = None
    geometry: Geometry | None = None
    map: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    metrics: dict[str, Any] | None = field(default=None, compare=False)

    def batched(self, input: Tensor) -> tuple[Tensor, bool]:
        """(a batch `[N, ...]`, whether the input was one sample).

        Raises:
            InputError: another shape or type than expected; no sample; a scalar.
        """
        if not isinstance(input, Tensor):
            raise InputError(f"input: expected a tensor, got {type(input).__name__}")
        got = f"{input.dtype} {list(input.shape)}"
        if self.shape is None:
            if input.dim() == 0:
                raise InputError(f"input: expected a batch [N, ...], got {got}")
            one = False
        else:
            wanted = list(self.shape)
            one = list(input.shape) == wanted
            if (not one and list(input.shape[1:]) != wanted) or (self.dtype is not None and input.dtype != self.dtype):
                what = f"{'' if self.dtype is None else f'{self.dtype} '}{wanted} or a batch of such, [N, ...]"
                raise InputError(f"input: task {self.task!r} takes {what}; got {got}")
        if not one and len(input) == 0:
            raise InputError(f"input: expected one sample or more, got {got}")
        return (input.unsqueeze(0) if one else input).detach(), one


def facts_of(
    name: str,
    meta: store.Metadata | store.TaskFile,
    digest: str,
    sample: Tensor | None,
    dtype: torch.dtype,
) -> Facts:
    """What a file, or its header, says.

    Args:
        sample: one sample as every task takes it, where the engine was given one.
        dtype: of the base, whose images are of it.

    Raises:
        ConfigError: preprocessing that is no such thing.
    """
    geometry = geometry_of(meta.extra, name)
    shape, kind = (None, None) if sample is None else (tuple(sample.shape), sample.dtype)
    if sample is None and geometry is not None:
        shape, kind = (geometry.channels, geometry.height, geometry.width), dtype
    labels = None if meta.labels is None else tuple(meta.labels)
    method = str(meta.method.get("method", ""))
    notes = (stored(meta.extra, name) or {}).get("map")
    made = None if notes is None else str(notes.get("kind")) if isinstance(notes, dict) else "maps"
    return Facts(name, digest, method, labels, geometry, made, shape, kind, meta.metrics)
