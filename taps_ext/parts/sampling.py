"""The samples of one forward that closed layers estimate their score gradients from (`TapsConfig.gate_fraction`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Sample(NamedTuple):
    """`rows`, int64 `[ceil(f * batch)]`, ascending: drawn uniformly and without repetition from a batch of samples."""

    batch: int
    rows: Tensor
    fits: list[bool]  # of every closed layer that could use it, as far as it runs eagerly: whether its input has them

    @property
    def scale(self) -> float:
        """What the sum over the rows is multiplied by to estimate the sum over the batch."""
        return self.batch / len(self.rows)


def batch_size(args: Any, kwargs: Any, dim: int) -> int | None:
    """How many samples a forward's arguments hold, or None where nothing says so.

    It is the size of dimension `dim` of the first tensor that has another one there than 1: a mask or a table of
    positions that is broadcast over the batch has 1. A list of images `[C, H, W]`, C up to 4, as detectors take it, is
    a batch of as many as it has.
    """
    found = None
    listed = _images if dim == 0 else None
    for leaf in tree_leaves((args, kwargs), is_leaf=listed):
        if isinstance(leaf, list):
            size = len(leaf)
        elif isinstance(leaf, Tensor) and leaf.dim() > dim:
            size = leaf.shape[dim]
        else:
            continue
        if size != 1:
            return size
        found = 1
    return found


def _images(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] <= 4 for image in value)
    )


def rows_of(leading: Sequence[int], sample: Sample) -> Tensor | None:
    """Which rows of a layer's input `[*leading, ...]`, its leading dimensions as one, belong to the sample.

    The batch is the first dimension, or several rows of the first belong to each sample (windows, frames, flattened
    tokens), or it is another of the leading dimensions (sequence first). None where no dimension fits: such an input
    is not made of samples. Where sizes coincide the parts that are drawn may be other parts of the input than samples;
    they are equally many and equally likely, so that the estimate stays unbiased.
    """
    batch, rows = sample.batch, sample.rows
    if not batch or not math.prod(leading) or not leading:
        return None
    if leading[0] % batch == 0:
        before, after = 1, math.prod(leading) // batch
    elif batch in leading:
        dim = list(leading).index(batch)
        before, after = math.prod(leading[:dim]), math.prod(leading[dim + 1 :])
    else:
        return None
    if before == after == 1:
        return rows
    starts = torch.arange(before, device=rows.device)[:, None, None] * (batch * after)
    return (starts + rows[:, None] * after + torch.arange(after, device=rows.device)).flatten()


def run(
    op: Callable[..., Tensor], trailing: int, sample: Sample | None, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A gated op on an input with `trailing` dimensions after those of the batch; a closed layer takes the sample."""
    score = args[2]
    if sample is not None and kwargs["gate"] is False and torch.is_grad_enabled() and score is not None:
        rows = rows_of(input.shape[:-trailing], sample) if score.requires_grad else None
        if score.requires_grad and not torch.compiler.is_compiling():
            sample.fits.append(rows is not None)
        if rows is not None:
            kwargs |= {"rows": rows, "row_scale": sample.scale}
    return op(input, *args, **kwargs)
