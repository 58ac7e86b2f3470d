"""The head: which module of a base is its classifier, and what a task has in its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, suggestion
from ..parts.host import HOOKS, original_class
from ..routing.route import unroute
from .classifiers import last_linear

_HEAD_NAMES = ("fc", "classifier", "head", "heads", "linear")


def find_head(base: nn.Module) -> str | None:
    """The name of the classifier: what a base says itself by its attribute `head_module`, timm's `get_classifier()`, a
    usual name, or a last linear child."""
    said = getattr(base, "head_module", None)
    if isinstance(said, str) and said in dict(base.named_modules()):
        return said
    getter = getattr(base, "get_classifier", None)
    if callable(getter):
        classifier = getter()
        if isinstance(classifier, (tuple, list)):
            return None  # distilled models average several: none of them alone is the head
        for name, module in base.named_modules():
            if module is classifier and isinstance(module, nn.Linear):
                return name
    for name in _HEAD_NAMES:
        child = base._modules.get(name)
        if child is not None and (found := last_linear(child, name)) is not None:
            return found
    children = [(name, child) for name, child in base.named_children() if any(True for _ in child.parameters())]
    return children[-1][0] if children and isinstance(children[-1][1], nn.Linear) else None


def head_path(base: nn.Module, name: str | None = None) -> str | None:
    """The head called `name`, or the one that is found; by its first name, where a model knows it by several.

    Raises:
        ConfigError: the base has no module called `name`.
    """
    name = find_head(base) if name is None else name
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"head_module: expected a module's name such as 'fc', got {name!r}")
    known = dict(base.named_modules(remove_duplicate=False))
    if name not in known:
        raise ConfigError(f"head_module: the base has no module {name!r}{suggestion(name, known)}")
    return next(first for first, module in base.named_modules() if module is known[name])


def head_paths(base: nn.Module, names: str | Sequence[str] | None = None) -> list[str]:
    """The heads called `names`, one or several, or none of `[]`, or the one that is found, if any: each by its first
    name.

    Raises:
        ConfigError: no name, the same one twice, one that the base has not, or among several one of no linear layer.
    """
    if not isinstance(names, (list, tuple)):
        path = head_path(base, names)  # type: ignore[arg-type]
        return [] if path is None else [path]
    paths = [str(head_path(base, "" if name is None else name)) for name in names]
    for name, path in zip(names, paths, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"head_module: expected each module once, got {name!r} again")
        if len(paths) > 1 and not isinstance(base.get_submodule(path), nn.Linear):
            kind = original_class(base.get_submodule(path)).__name__
            raise ConfigError(f"head_module: expected linear layers where there are several, got {name!r}, a {kind}")
    return paths


def _plain(head: nn.Module) -> nn.Module:
    """Undo the routing that a copy of a base module brings along."""
    for module in head.modules():
        unroute(module)
    return head


def own_head(taken: nn.Module, head: nn.Module) -> nn.Module:
    """Check that a head brought by the user is a module of its own, and make it plain.

    Args:
        taken: whose tensors it must not share: the base, or the model with all its tasks.

    Raises:
        ConfigError: not a module, one that shares tensors, or state that no task file holds.
    """
    if not isinstance(head, nn.Module):
        raise ConfigError(f"head: expected an nn.Module, got {type(head).__name__}")
    shared = {id(t) for held in (taken.parameters(), taken.buffers()) for t in held}
    if any(id(t) in shared for held in (head.parameters(), head.buffers()) for t in held):
        raise ConfigError("head: expected a module of its own, got one that shares tensors with the base or a task")
    for name, module in head.named_modules():
        if any(is_lazy(tensor) for held in (module._parameters, module._buffers) for tensor in held.values()):
            raise ConfigError(
                f"head: {name or type(head).__name__}: expected initialised parameters; run it once first"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ConfigError(f"head: {name or type(head).__name__}: has extra state, which no task file holds")
    return _plain(head)


def _copied(old: nn.Module, path: str) -> nn.Module:
    """A copy of the base's head without its hooks: they run where it is called, whoever's head answers."""
    try:
        head = _plain(copy.deepcopy(old)).requires_grad_(True)
    except RuntimeError as error:
        raise ConfigError(f"head: {path} cannot be copied ({error}); give num_classes or a head") from None
    for key in HOOKS:
        head.__dict__[key] = type(head.__dict__[key])()
    return head


def make_head(
    base: nn.Module, path: str | None, num_classes: int | None, head: nn.Module | None, taken: nn.Module
) -> nn.Module | None:
    """The head of a new task: `head`, a fresh `nn.Linear` to `num_classes`, or a copy of the base's own.

    `taken`: as for :func:`own_head`.
    """
    if head is not None and num_classes is not None:
        raise ConfigError("add_task: expected num_classes or head, got both")
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
    ):
        raise ConfigError(f"num_classes: expected an int >= 1, got {num_classes!r}")
    if path is None:
        if head is None and num_classes is None:
            return None
        raise ConfigError("head_module: no linear classifier was found in the base; name the module to replace")
    old = base.get_submodule(path)
    if head is not None:
        own = own_head(taken, head)
        if isinstance(old, nn.Linear) and isinstance(own, nn.Linear) and own.in_features != old.in_features:
            raise ConfigError(f"head: expected {old.in_features} inputs as the base's has, got {own.in_features}")
        return own
    if num_classes is None:
        return _copied(old, path)
    if not isinstance(old, nn.Linear):
        raise ConfigError(f"head: expected a module, since {path!r} is a {original_class(old).__name__}, not a Linear")
    return nn.Linear(old.in_features, num_classes, old.bias is not None, old.weight.device, old.weight.dtype)
