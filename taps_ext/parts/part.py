"""Part: what the rest of the house knows of a task.

Reports, optimizer groups and merging speak to parts in these words and ask for nothing of a part's kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

# A module's work without gradients and with them: `torch.is_grad_enabled()` is the place. A stock linear or convolution
# layer's are called with (host, input, sample), all others with what the module's forward is called with.
Bound = tuple[Callable[..., Any], Callable[..., Any]]


class Part(nn.Module):
    """What a task has at one module of the base, its host. A part that adds nothing is the host as it is.

    Attributes:
        gated: whether it has a gate.
        group: where a task's file keeps what :meth:`stored` gives: "norms", "values", or None for its own place.
    """

    gated: ClassVar[bool] = False
    group: ClassVar[str | None] = None

    @property
    def replacement(self) -> nn.Module | None:
        """The module that stands in the host's place, where one does."""
        return None

    def bind(self, host: nn.Module, *, stock: bool) -> Bound | None:
        """The one thing to do at the host, settled for now; None where the host's own forward must run and read what it
        needs (`nn/reads.py`). `stock`: the host is a linear or convolution layer with the stock forward."""
        return None

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by what they are: "delta", "weight" (the task's own in the place of W + Delta), "score",
        "bias" (a gated layer's own), "norm", "other" or "head"."""
        raise NotImplementedError

    def values(self, host: nn.Module) -> dict[str, Tensor]:
        """The tensors that the host has under the task, by their names in it, for merging and plain checkpoints; those
        that are missing are the base's. They may be the task's own: copy before writing."""
        return {}

    def stored(self) -> dict[str, Tensor]:
        """What a task's file must hold of it under :attr:`group`, by the names that the host has for it."""
        return {}

    def lost(self) -> list[str]:
        """What it holds that no file keeps, in words.

        Raises:
            TapsError: without which the file would belong to no model.
        """
        return []

    def follow(self) -> None:
        """Take over what was set on the host, and its mode."""

    def drop_caches(self) -> None:
        """Forget what was made of values that are gone."""

    def hand_over(self, plain: nn.Module) -> None:
        """Give a plain module that has this part's values what the task made of them and keeps beside them."""
