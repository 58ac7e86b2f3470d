"""Guard: whether a base still holds what it held when it was adapted.

A task belongs to the base that it was trained on. Where a forward or a stray optimizer writes to that base, the task's
file would belong to no base that exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .caches import digest, is_cache
from .scan import inside, names_of


def tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by what they are and their name."""
    yield from ((f"parameter {name}", parameter) for name, parameter in base.named_parameters())
    yield from ((f"buffer {name}", buffer) for name, buffer in base.named_buffers())


class Guard:
    """What the tensors of a base held when its tasks were added, or last moved or loaded."""

    def __init__(self) -> None:
        self.held: dict[str, str | None] | None = None  # None until noted
        self.problem: str | None = None  # found when the base was last moved; `held` knows nothing of it any more

    def forget(self, base: nn.Module, head: str | None) -> None:
        """The base is about to be moved or cast: what is wrong with it must be found before."""
        self.problem = self.check(base, head)
        self.held = None

    @torch.compiler.disable
    def note(self, base: nn.Module) -> None:
        """Take the base as it is now, unless it is known."""
        if self.held is None:
            self.held = {name: digest(tensor) for name, tensor in tensors(base)}

    @torch.compiler.disable
    def check(self, base: nn.Module, head: str | None) -> str | None:
        """What has changed outside the head, in words, or None."""
        if self.problem is not None or self.held is None:
            return self.problem
        heads = [] if head is None else names_of(base, base.get_submodule(head))
        for name, tensor in tensors(base):
            if any(inside(name.partition(" ")[2].rpartition(".")[0], skipped) for skipped in heads):
                continue
            kind, _, short = name.partition(" ")
            held, now = self.held.get(name, ""), digest(tensor)
            if held != now and kind == "buffer" and is_cache(base, short, tensor):
                continue
            if held == "":
                advice = "run the base once before it is adapted"
                if name.startswith("parameter"):
                    advice = "undo what put it there (pruning, a parametrisation), or do that before"
                return (
                    f"the base's {name} has appeared since the base was adapted, so that a fresh base is another one; "
                    f"{advice}"
                )
            if None not in (held, now) and held != now:
                advice = 'give it to the task (others="task") or freeze what writes to it'
                if name.startswith("parameter"):
                    advice = "put its values back (load_state_dict), and freeze what writes to it"
                return (
                    f"the base's {name} has changed since the base was adapted, so that tasks would belong to no base "
                    f"that exists; {advice}"
                )
        return None
