"""The queue: requests that can be answered now, until a batch of one shape and type is full or the first has waited
long enough."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tasks import Entry

Key = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(eq=False)
class Request:
    """One call of `submit`.

    Attributes:
        input: as it was given; `batch`: `[N, ...]`, once it is known what the task takes. one: it was one sample.
        arrived: in seconds of `time.monotonic`.
        digest: of the task's file that the input was made for, or None: any.
        whole: the future's result is an :class:`Answer`, else its output alone.
    """

    input: Tensor
    entry: Entry
    arrived: float
    digest: str | None = None
    whole: bool = False
    future: Future[Any] = field(default_factory=Future)
    batch: Tensor | None = None
    one: bool = False

    @property
    def samples(self) -> int:
        return 1 if self.batch is None else len(self.batch)

    @property
    def key(self) -> Key:
        assert self.batch is not None
        return self.batch.shape[1:], self.batch.dtype, self.batch.device


class Queue:
    """Requests by what can be one batch, each kind in the order of arrival.

    Args:
        max_batch: samples of a batch; a request that has more is one alone.
        max_delay: seconds after the first one's arrival.
    """

    def __init__(self, max_batch: int, max_delay: float) -> None:
        self.max_batch, self.max_delay = max_batch, max_delay
        self._kinds: dict[Key, deque[Request]] = {}
        self._samples: dict[Key, int] = {}

    def __len__(self) -> int:
        """Requests."""
        return sum(map(len, self._kinds.values()))

    def put(self, request: Request) -> None:
        self._kinds.setdefault(request.key, deque()).append(request)
        self._samples[request.key] = self._samples.get(request.key, 0) + request.samples

    def deadline(self) -> float | None:
        """When the first of all has waited long enough."""
        heads = [found[0].arrived for found in self._kinds.values()]
        return min(heads) + self.max_delay if heads else None

    def take(self, now: float, *, flush: bool = False) -> list[Request]:
        """The next batch; [] where none is due. `flush`: nothing more will come."""
        due = [
            (found[0].arrived, index, key)
            for index, (key, found) in enumerate(self._kinds.items())
            if flush or self._samples[key] >= self.max_batch or found[0].arrived + self.max_delay <= now
        ]
        if not due:
            return []
        key = min(due)[2] if len(due) > 1 else due[0][2]
        found, taken, samples = self._kinds[key], list[Request](), 0
        while found and (not taken or samples + found[0].samples <= self.max_batch):
            taken.append(found.popleft())
            samples += taken[-1].samples
        self._samples[key] -= samples
        if not found:
            del self._kinds[key], self._samples[key]
        return taken

    def clear(self) -> list[Request]:
        """All of them, taken out."""
        everything = [request for found in self._kinds.values() for request in found]
        self._kinds, self._samples = {}, {}
        return everything
