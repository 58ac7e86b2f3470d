"""fold_norms: batch norms folded into the layers before them, for a model that only runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..base.dataflow import dataflow
from ..base.scan import names_of
from ..errors import ConfigError
from .task_model import TaskModel

_FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Folded(NamedTuple):
    """What :func:`fold_norms` made.

    Attributes:
        model: a plain module in evaluation mode, whose folded norms are nn.Identity.
        folded: norm -> the layer that it was folded into. left: norm -> why it is still there.
    """

    model: nn.Module
    folded: dict[str, str]
    left: dict[str, str]


def _why_not(norm: nn.Module) -> str | None:
    """Why a norm is no fixed scale and bias of its input, or None."""
    kind = type(norm)
    if kind not in _FOLDED:
        return f"it is a {kind.__name__}, no batch norm of torch's"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics, and computes them of its input"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fold_norms(model: nn.Module, inputs: Sequence[Any], *, task: str | None = None) -> Folded:
    """A copy of a model with its batch norms folded into the convolutions and linear layers before them:

        W' = gamma / sqrt(var + eps) * W,  b' = gamma / sqrt(var + eps) * (b - mu) + beta

    so that a task with norms of its own (a scale-and-bias patch, TAPS, fine-tuning) costs no norms when it runs. In
    evaluation mode this changes nothing but roundings. A norm is folded where one forward shows that its input is the
    result of a layer which nothing else reads; all others are named, with the reason.

    Args:
        model: a plain module, or a :class:`TaskModel`, of which a task's plain copy is taken. It is left as it is. It
            must be in evaluation mode.
        inputs: the forward's positional arguments, for that one forward; what it does must not depend on their values.
        task: of a TaskModel; by default the active one.

    Raises:
        ConfigError: a model or a norm in training mode; inputs that are no sequence; a task that is not known.
        UnsupportedModuleError: a task that does not fold into plain weights, naming the module.
    """
    if isinstance(inputs, (Tensor, str)) or not isinstance(inputs, Sequence) or not inputs:
        raise ConfigError(f"inputs: expected a tuple of the forward's arguments, got {type(inputs).__name__}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a module, got {type(model).__name__}")
    if model.training:
        raise ConfigError("model: expected one in evaluation mode, got training mode; call eval() first")
    if isinstance(model, TaskModel):
        name = model.active_task if task is None else task
        if name is None:
            raise ConfigError("task: expected the name of a task, none being active")
        plain = model._plain_copy(name).eval()
    elif task is not None:
        raise ConfigError(f"task: expected none with a plain module, got {task!r}")
    else:
        plain = copy.deepcopy(model)
    for name, module in plain.named_modules():
        if isinstance(module, _FOLDED) and module.training:
            raise ConfigError(f"model: expected all norms in evaluation mode, got {name} in training mode")
    found = dataflow(plain, lambda: plain(*inputs))
    modules = dict(plain.named_modules())
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    for name in sorted([*found.layer, *found.why], key=list(modules).index):
        norm, layer = modules[name], found.layer.get(name, "")
        reason = _why_not(norm) or found.why.get(name)
        if reason is None and (hooked := [n for n in (layer, name) if _hooked(modules[n])]):
            reason = f"{hooked[0]} has hooks"
        if reason is not None:
            left[name] = reason
            continue
        folded[name], host = layer, modules[layer]
        fused: nn.Module = fuse_linear_bn_eval(host, norm) if type(host) is nn.Linear else fuse_conv_bn_eval(host, norm)
        for old, new in ((host, fused), (norm, nn.Identity().eval())):
            for alias in names_of(plain, old):
                plain.set_submodule(alias, new)
    return Folded(plain, folded, left)
