"""Classifiers: which linear layers of a base look like its classifiers, where there are several.

Distilled and multi-scale models average the outputs of two or more, others have auxiliary ones. A head in the place of
one alone makes outputs that cannot be added to the others', or, with as many classes, a model that is silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError


def last_linear(module: nn.Module, name: str) -> str | None:
    """The name of the last linear layer in `module`, which is called `name`, or None."""
    found = None
    for child, sub in module.named_modules(prefix=name):
        if isinstance(sub, nn.Linear):
            found = child
    return found


def classifiers(base: nn.Module, head: str | None) -> list[str]:
    """The names of linear layers that look like classifiers: those that timm says are, in its order, then `head`, then
    those with as many outputs, where nothing in the base takes so many inputs, as it would a hidden layer's."""
    told, sized = [*_told(base), *_returned(base)], _of_a_size(base, head)
    return list(dict.fromkeys([*told, *(name for name in sized if name == head), *sized]))


def check_one(base: nn.Module, head: str | None) -> None:
    """Raise if the base has several classifiers, of which a task's head would replace `head` alone.

    Raises:
        ConfigError: naming all, and how to give each a head.
    """
    found = classifiers(base, head)
    if len(found) < 2:
        return
    raise ConfigError(
        f"head_module: {', '.join(found[:-1])} and {found[-1]} look like classifiers of this base alike; for a head in "
        f"the place of each say head_module={found!r} (add_task then makes all by num_classes, or copies them), or "
        f"head_module={found[0]!r} for a head there alone, beside which the others are layers like any; "
        "head_module=[] for none, where the task has no head and all are layers"
    )


def _named(base: nn.Module, name: Any) -> str | None:
    """The classifier in the module called `name`."""
    module = dict(base.named_modules()).get(name) if isinstance(name, str) else None
    return None if module is None else last_linear(module, name)


def _told(base: Any) -> Iterator[str]:
    """Those in the configuration of a timm model."""
    settings = getattr(base, "pretrained_cfg", None)
    told = settings.get("classifier") if isinstance(settings, dict) else None
    if isinstance(told, (tuple, list)):
        yield from (name for one in told if (name := _named(base, one)) is not None)


def _returned(base: Any) -> Iterator[str]:
    """Those that timm's `get_classifier()` returns several of."""
    getter = getattr(base, "get_classifier", None)
    returned = getter() if callable(getter) else None
    if isinstance(returned, (tuple, list, nn.ModuleList)):
        held = {id(module) for module in returned}
        for name, module in base.named_modules():
            if id(module) in held and (found := last_linear(module, name)) is not None:
                yield found


def _of_a_size(base: nn.Module, head: str | None) -> list[str]:
    """Those with as many outputs as the head, if nothing else in the base has a size like that."""
    size = None if head is None else getattr(base.get_submodule(head), "out_features", None)
    if size is None:
        return []
    alike = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and m.out_features == size}
    theirs = {id(tensor) for module in alike.values() for tensor in module.parameters(recurse=False)}
    others = [p.shape if p.dim() <= 2 else p.shape[:1] for p in base.parameters() if id(p) not in theirs]
    read = any(size in shape for shape in others) or any(module.in_features == size for module in alike.values())
    return [] if read else list(alike)
