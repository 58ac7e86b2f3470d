"""Memory that W_t borrows for the length of one forward of its module, on a CPU.

Fresh memory of a weight's size costs a CPU more than the sum that is written into it: the system hands out pages one by
one. A GPU's allocator keeps what is freed, so that there is nothing to add there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_lending: ContextVar[bool] = ContextVar("taps_ext_lending", default=False)


class _Pool(threading.local):
    """Buffers of one thread. One is free when nothing but the pool refers to it: whoever keeps a W_t, or a view of it,
    keeps the buffer."""

    def __init__(self) -> None:
        self.buffers: list[torch.UntypedStorage] = []

    def take(self, nbytes: int) -> torch.UntypedStorage:
        free = [buffer for buffer in self.buffers if _users(buffer) == 1]
        found = min((b for b in free if b.nbytes() >= nbytes), key=lambda b: b.nbytes(), default=None)
        if found is None:
            # Those that are free are too small.
            self.buffers = [buffer for buffer in self.buffers if _users(buffer) > 1]
            found = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
            self.buffers.append(found)
        return found


def _users(storage: torch.UntypedStorage) -> int:
    users: int = torch._C._storage_Use_Count(storage._cdata)
    return users


_pool = _Pool()


@contextmanager
def lending() -> Iterator[None]:
    """Inside, :func:`like` borrows."""
    token = _lending.set(True)
    try:
        yield
    finally:
        _lending.reset(token)


def like(weight: Tensor) -> Tensor:
    """An uninitialised tensor of a weight's shape, strides and type; borrowed inside :func:`lending`."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not torch.is_inference_mode_enabled()
    if not _lending.get() or weight.device.type != "cpu" or not plain:
        return torch.empty_like(weight)
    stride = torch.empty_like(weight, device="meta").stride()
    storage = _pool.take(weight.nbytes)
    return torch.empty(0, dtype=weight.dtype).set_(storage, 0, weight.shape, stride)
