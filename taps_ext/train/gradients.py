"""Gradients of a second loss, such as a penalty, on top of those that are there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.constant import constant


def add_gradients(value: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """What `value.backward()` adds to the gradients of these parameters, to the bit: on a GPU by one launch, where
    backward needs one for each, as of the scores that a penalty is made of."""
    held = [parameter for parameter in parameters if parameter.requires_grad]
    if not held:
        return
    seed = constant((1.0,), value.device, value.dtype).view_as(value)  # a scalar, or of one element
    found = torch.autograd.grad(value, held, seed, allow_unused=True)
    there: list[Tensor] = []
    more: list[Tensor] = []
    taken: list[Any] = []
    with torch.no_grad():
        for parameter, gradient in zip(held, found, strict=True):
            if gradient is None:
                continue
            taken.append(parameter)
            if parameter.grad is None:  # of its own memory: what came may be another one's, or this function's
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                there.append(parameter.grad)
                more.append(gradient)
        if there:
            torch._foreach_add_(there, more)
    for parameter in taken:
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
