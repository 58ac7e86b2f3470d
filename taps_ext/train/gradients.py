"""Gradients of a second loss, such as a penalty, on top of those that are there."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@functools.lru_cache(maxsize=16)
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones([], device=device, dtype=dtype)


def add_gradients(value: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """What `value.backward()` adds to the gradients of these parameters, to the bit: on a GPU by one launch, where
    backward needs one for each, as of the scores that a penalty is made of."""
    held = [parameter for parameter in parameters if parameter.requires_grad]
    found = torch.autograd.grad(value, held, _one(value.device, value.dtype).expand_as(value), allow_unused=True)
    there: list[Tensor] = []
    more: list[Tensor] = []
    for parameter, gradient in zip(held, found, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.detach()
        else:
            there.append(parameter.grad)
            more.append(gradient)
    if there:
        with torch.no_grad():
            torch._foreach_add_(there, more)
