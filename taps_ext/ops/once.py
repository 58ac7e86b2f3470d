"""Backwards that know no further derivative, and say so where one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NOT_TWICE = (
    "taps_ext: the backward of gated layers cannot be differentiated again; torch.func gives derivatives of every "
    "order, and so does the plain model that merge_and_unload(name) gives"
)


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A `Function.backward` whose results, under `create_graph=True`, refuse to be differentiated.

    torch's own of this name lets results pass as constants where the incoming gradient is one, though they depend on
    weights and inputs: a second derivative would lack those terms without a word.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        made = [None if one is None else one.detach().requires_grad_() for one in found]
        refused = torch._C._functions.DelayedError(NOT_TWICE.encode(), len(made))(*made)  # type: ignore[arg-type]
        return refused if isinstance(refused, tuple) else (refused,)

    return run
