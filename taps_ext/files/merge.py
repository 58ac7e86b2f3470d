"""Merging: the weights of a task's stacks, folded beside the base or into a plain copy of it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.flags import Flags
from ..base.scan import names_of, shared_tensors
from ..errors import TapsError, UnsupportedModuleError
from ..parts import Below, Installed, Part
from ..parts.host import HOOKS, base_bias, base_weight, host_of, owner_of
from ..parts.layer import refusing
from ..parts.rebind import rebind

Stacks = Mapping[str, tuple[Part, ...]]


@contextmanager
def named(module: str) -> Iterator[None]:
    """A refusal names the module."""
    try:
        yield
    except UnsupportedModuleError as error:
        raise UnsupportedModuleError(f"{module}: {error}") from None


def folded(stacks: Stacks, base: nn.Module) -> dict[str, Part]:
    """For every module with a gated part on top, the weight that the stack multiplies with: folded where it is changed,
    the base's own where not. For others what their uppermost part says (`Part.merged`).

    Raises:
        UnsupportedModuleError: a change that does not fold, naming the module.
    """
    found: dict[str, Part] = {}
    for name, stack in stacks.items():
        if any(part.gate is not None for part in stack):
            host = host_of(base, name)
            below = Below(host, stack)
            with named(name):
                weight, bias = below.folded(), below.bias()
            own = weight.detach() if weight is base_weight(host) else refusing(weight)
            if bias is not None and not isinstance(bias, nn.Parameter):
                bias = nn.Parameter(bias.detach(), requires_grad=False)
            found[name] = Installed(own, None if bias is base_bias(host) else bias)
            continue
        with named(name):
            instead = stack[-1].merged(Below(host_of(base, name), stack[:-1]))
        if instead is not None:
            found[name] = instead
    return found


def values_of(stack: tuple[Part, ...], host: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module has under a stack, as far as they are not the base's."""
    found: dict[str, Tensor] = {}
    for index, part in enumerate(stack):
        found |= part.values(Below(host, stack[:index]))
    return found


def _install(target: nn.Module, key: str, value: Tensor) -> None:
    """A tensor of its own in the place of `target.key`, which another module may share."""
    old = getattr(target, key)
    alike = old is not None and old.shape == value.shape  # else a buffer that a forward built
    own = torch.empty_like(old, requires_grad=False).copy_(value) if alike else value.clone()
    if isinstance(old, nn.Parameter):
        target._parameters[key] = nn.Parameter(own, requires_grad=old.requires_grad)
    else:
        target._buffers[key] = own


def plain_copy(base: nn.Module, stacks: Stacks, head_path: str | None, flags: Flags) -> nn.Module:
    """A copy of the routed base as it will be when unloaded, with the tensors and the head of these stacks in place.

    Raises:
        UnsupportedModuleError: a change that does not fold, naming the module.
    """
    tensors = {}
    for name, stack in stacks.items():
        with named(name):
            tensors[name] = values_of(stack, host_of(base, name))
    taken = {name: stack[-1].replacement for name, stack in stacks.items() if stack[-1].replacement is not None}
    plain, instead = copy.deepcopy((base, taken))
    flags.restore_copy(plain, base)
    clones = {id(module): own for module, own in zip(base.modules(), plain.modules(), strict=True)}
    for own in plain.modules():  # functions are not copied, nor what they close over
        own.__dict__.update({key: rebind(value, clones) for key, value in own.__dict__.items()})
    for name, values in tensors.items():
        target = owner_of(host_of(plain, name))
        for key, value in values.items():
            _install(target, key, value.detach())
    for name, stack in stacks.items():
        for part in stack:
            part.hand_over(owner_of(host_of(plain, name)))
    for path, module in instead.items():
        _take_hooks(module, plain.get_submodule(path))
        for name in names_of(base, base.get_submodule(path)):
            plain.set_submodule(name, module)
        if path == head_path:
            _tell_config(plain, module)
    return plain


def _tell_config(model: Any, head: nn.Module) -> None:
    """A transformers model computes its loss by the number of classes in its config, and is loaded by that."""
    config, outputs = getattr(model, "config", None), getattr(head, "out_features", None)
    known = getattr(config, "num_labels", None)
    if config is not None and isinstance(known, int) and isinstance(outputs, int) and known != outputs:
        config.num_labels = outputs
        if isinstance(getattr(model, "num_labels", None), int):
            model.num_labels = outputs


def _take_hooks(head: nn.Module, replaced: nn.Module) -> None:
    """The hooks of the head that is replaced go on running: around those of the new one."""
    for key in HOOKS:
        outer, inner = replaced.__dict__[key], head.__dict__[key]
        both = (outer, inner) if "pre" in key else (inner, outer)
        head.__dict__[key] = OrderedDict(item for hooks in both for item in hooks.items())
    if head._is_full_backward_hook is None:
        head._is_full_backward_hook = replaced._is_full_backward_hook


def check_one_value(base: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a plain checkpoint would need two values for what is one tensor in the base.

    Raises:
        TapsError: naming both; `merge_and_unload`'s copy holds them.
    """
    for one, other in shared_tensors(base):
        if one in tensors and other in tensors and not torch.equal(tensors[one], tensors[other]):
            raise TapsError(
                f"{other}: is one tensor with {one} in the base, and the task has another value for each, which no "
                "model of the base's architecture can load; save merge_and_unload()'s copy instead"
            )
