"""Guard: whether a base still holds what it held when it was adapted.

A task belongs to the base that it was trained on. Where a forward or a stray optimizer writes to that base, the task's
file would belong to no base that exists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .caches import digest, is_cache
from .scan import inside, names_of


def tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by what they are and their name."""
    yield from ((f"parameter {name}", parameter) for name, parameter in base.named_parameters())
    yield from ((f"buffer {name}", buffer) for name, buffer in base.named_buffers())


_version = attrgetter("_version")


def _stamp(tensor: Tensor) -> tuple[int, int, bool]:
    return id(tensor), -1 if tensor.is_inference() else tensor._version, tensor.requires_grad


class Held:
    """The tensors of a base at one moment: their names, objects and versions, and whether they require gradients."""

    @torch.compiler.disable
    def __init__(self, base: nn.Module) -> None:
        self.stamps: dict[str, tuple[int, int, bool]] = {}
        self.kept: list[Tensor] = []  # so that no other tensor gets the identity of one of these
        for prefix, module in base.named_modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        self.stamps[f"{prefix}.{key}" if prefix else key] = _stamp(tensor)
                        self.kept.append(tensor)

    @torch.compiler.disable
    def changed(self, base: nn.Module) -> str | None:
        """What is another in the base now, in words, or None."""
        now = Held(base).stamps
        if now == self.stamps:
            return None
        for name, stamp in self.stamps.items():
            found = now.get(name)
            if found is None:
                return f"tensor {name}, which is gone"
            if found[0] != stamp[0]:
                return f"tensor {name}, in whose place is another"
            if found[1] != stamp[1]:
                return f"tensor {name}, which was written to"
            if found[2] != stamp[2]:
                return f"tensor {name}, which {'requires' if found[2] else 'no longer requires'} gradients"
        return f"tensor {next(name for name in now if name not in self.stamps)}, which is new"


class Guard:
    """What the tensors of a base held when its tasks were added, or last moved or loaded."""

    def __init__(self) -> None:
        self.held: dict[str, str | None] | None = None  # None until noted
        self.problem: str | None = None  # found when the base was last moved; `held` knows nothing of it any more
        self.watched: dict[str, Tensor] | None = None  # parameters whose versions are compared in training
        self.versions: list[int] = []  # of these, as they were last found to hold what was noted
        self.asks = True  # whether a parameter requires gradients

    def forget(self, base: nn.Module, head: str | None) -> None:
        """The base is about to be moved or cast: what is wrong with it must be found before."""
        self.problem = self.check(base, head)
        self.held, self.watched, self.versions = None, None, []

    @torch.compiler.disable
    def note(self, base: nn.Module) -> None:
        """Take the base as it is now, unless it is known."""
        if self.held is None:
            self.held = {name: digest(tensor) for name, tensor in tensors(base)}
            self._watch(base)

    def _watch(self, base: nn.Module) -> dict[str, Tensor]:
        self.watched = {name: parameter for name, parameter in base.named_parameters() if not parameter.is_inference()}
        self.versions = list(map(_version, self.watched.values()))
        return self.watched

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watched": None, "versions": [], "asks": True}  # a copy's tensors are others

    @torch.compiler.disable
    def written(self, base: nn.Module, head: str | None) -> str | None:
        """What has been written to the base's parameters outside the head, or is about to be, in words, or None.

        For every forward in training: versions are compared, and values of those parameters alone whose versions are
        others than they were. Whether one requires gradients is asked in the first of these forwards, and after each
        `train()`. Buffers, and writes that leave no trace in versions, are found when a task is saved.
        """
        watched = self._watch(base) if self.watched is None else self.watched
        versions = list(map(_version, watched.values()))
        if versions == self.versions and not self.asks:
            return None
        pairs = zip(watched.values(), versions, self.versions, strict=True)
        problem = self.check(base, head, {id(parameter) for parameter, now, was in pairs if now != was})
        trains = next((name for name, parameter in watched.items() if parameter.requires_grad), None)
        advice = (
            "train model.parameter_groups(...), and say what is to train by model.requires_grad_(), which leaves the "
            "base alone"
        )
        if problem is not None:
            return problem if trains is None else f"{problem}. The base's {trains} requires gradients: {advice}"
        self.versions = versions  # of the same values again, or the head's
        if trains is not None:
            return (
                f"the base's parameter {trains} requires gradients, so that an optimizer over model.parameters() would "
                f"write to the base, which no task trains; {advice}"
            )
        self.asks = False
        return None

    @torch.compiler.disable
    def check(self, base: nn.Module, head: str | None, among: Collection[int] | None = None) -> str | None:
        """What has changed outside the head, in words, or None. `among`: look at these tensors alone, by `id`."""
        if self.problem is not None or self.held is None:
            return self.problem
        heads = [] if head is None else names_of(base, base.get_submodule(head))
        for name, tensor in tensors(base):
            if any(inside(name.partition(" ")[2].rpartition(".")[0], skipped) for skipped in heads):
                continue
            if among is not None and id(tensor) not in among:
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
                    advice = (
                        "put its values back (load_state_dict), and freeze what writes to it. An average of the whole "
                        "model is to leave equal values as they are: AveragedModel without avg_fn, or with "
                        "multi_avg_fn=get_ema_multi_avg_fn(decay), does"
                    )
                return (
                    f"the base's {name} has changed since the base was adapted, so that tasks would belong to no base "
                    f"that exists; {advice}"
                )
        return None
