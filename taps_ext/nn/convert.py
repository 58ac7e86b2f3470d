"""convert and revert: drop-in layers in the place of a model's stock layers, for those who want no TaskModel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..base.scan import match, names_of
from ..errors import ConfigError, UnsupportedModuleError
from ..model import TaskModel
from ..parts.host import HOOKS
from ..routing.route import is_routed
from .layers import TapsConv2d, TapsLinear, _TapsLayer

_KINDS: dict[type[nn.Module], type[TapsLinear] | type[TapsConv2d]] = {nn.Linear: TapsLinear, nn.Conv2d: TapsConv2d}


def convert(
    model: nn.Module, patterns: Sequence[str] = ("*",), *, threshold: float = 0.1, score_init: float = 0.15
) -> list[str]:
    """Put a :class:`TapsLinear` or :class:`TapsConv2d` in the place of every plain `nn.Linear` and `nn.Conv2d` of a
    model that a glob matches. Their weights and biases are shared and frozen; everything else stays as it is.

    A Delta acts where the layer is called: code that reads `layer.weight` instead (torchvision's Swin, for one) sees
    the base's. A TaskModel serves such models.

    Args:
        model: changed in place; a layer itself cannot be the model. patterns: globs of layer names.
        threshold, score_init: as for :class:`TapsLinear`.

    Returns:
        The names of the layers, in module order. A layer that the model knows by several names is one drop-in layer.

    Raises:
        ConfigError: a pattern matches no such layer; the model is a TaskModel's base or a bare layer.
        UnsupportedModuleError: two of the layers share a weight, naming them; a layer of a TransformerEncoderLayer.
    """
    if isinstance(patterns, str):
        raise ConfigError(f"patterns: expected a list of patterns, got {patterns!r}")
    if not patterns:
        raise ConfigError("patterns: expected at least one pattern, got none")
    if type(model) in _KINDS:
        raise ConfigError(
            f"model: expected a model with layers, got a {type(model).__name__}; call from_linear or from_conv2d"
        )
    if isinstance(model, TaskModel) or any(is_routed(module) for module in model.modules()):
        raise ConfigError("model: expected a plain model, got one that a TaskModel adapts; unload() that first")
    found = {name: module for name, module in model.named_modules() if type(module) in _KINDS}
    chosen = match(patterns, list(found), "patterns")
    for name in chosen:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise UnsupportedModuleError(
                f"{name}: a {type(parent).__name__} in evaluation mode reads the weight instead of calling the layer, "
                "so that its Delta would have no effect; leave it out, or use a TaskModel"
            )
    seen: dict[int, str] = {}
    for name in chosen:
        weight = found[name]._parameters.get("weight")
        if weight is None:
            raise UnsupportedModuleError(f"{name}: expected a layer with a weight of its own, got a pruned or tied one")
        other = seen.setdefault(id(weight), name)
        if other != name:
            raise UnsupportedModuleError(f"{name}: shares its weight with {other}; leave one of them out")
    for name in chosen:
        stock = found[name]
        _replace(model, stock, _KINDS[type(stock)].from_stock(stock, threshold=threshold, score_init=score_init))
    return chosen


def revert(model: nn.Module, *, merge: bool = True) -> list[str]:
    """Put stock layers back in the place of all drop-in layers of a model; returns their names.

    Args:
        merge: True gives them `W_t`, a new tensor where the gate is open, bit-equal to what the drop-in layer
            multiplied with; False their own weights, as before :func:`convert`.
    """
    if isinstance(model, TaskModel):
        raise ConfigError("model: expected a converted model, got a TaskModel; merge_and_unload() is its way back")
    found = {name: module for name, module in model.named_modules() if isinstance(module, _TapsLayer)}
    for layer in found.values():
        _replace(model, layer, layer.to_stock(merge=merge))
    return list(found)


def sparsity_loss(model: nn.Module, lam: float) -> Tensor:
    """`lam / L * sum_i |s_i|` over the L learned gates of a converted model (TAPS, equation 5), a scalar.

    Raises:
        ConfigError: the model has no drop-in layer with a learned gate.
    """
    import torch

    scores = [layer.score for layer in _layers(model) if layer.score is not None]
    if not scores:
        raise ConfigError("model: expected drop-in layers with learned gates, got none; call convert first")
    return lam / len(scores) * torch.stack(scores).abs().sum()


def _layers(model: nn.Module) -> Iterator[_TapsLayer]:
    return (module for module in model.modules() if isinstance(module, _TapsLayer))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    new.__dict__.update({key: old.__dict__[key] for key in HOOKS})  # themselves: handles are to remove them there
    for name in names_of(model, old):
        model.set_submodule(name, new)
