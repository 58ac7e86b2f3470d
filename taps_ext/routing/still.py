"""What a base draws and what it leaves out, while it is asked where it has its samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DROPS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_DRAWS = (torch.rand, torch.rand_like)
_BY_VALUE = (torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select, torch.unique, torch.argwhere)


class Still(TorchFunctionMode):
    """Equal samples stay equal: nothing is dropped, and what is drawn uniformly is a half.

    Attributes:
        ragged: the base has picked entries by their values, so that its sizes differ from batch to batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ragged = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPS:
            return args[0] if args else kwargs["input"]
        if func is Tensor.bernoulli_:
            return args[0].fill_(1)
        if func in _DRAWS:
            return func(*args, **kwargs).fill_(0.5)
        self.ragged = self.ragged or func in _BY_VALUE or (func is Tensor.__getitem__ and _masked(args[1]))
        return func(*args, **kwargs)


def _masked(index: Any) -> bool:
    found = index if isinstance(index, tuple) else (index,)
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) and one.dim() > 0 for one in found)
