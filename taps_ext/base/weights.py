"""Which tensors of a base are weights: what a gate can be put over, and what stands in its way."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..parts.host import GATED_TYPES, alone, is_norm, original_class, weight_name

# Torch's own layers whose weights torch multiplies with; those of GATED_TYPES have kernels of ours.
KNOWN_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
)
TABLES = (nn.Embedding, nn.EmbeddingBag)  # looked up, not multiplied with: gated on request

# What people call the weights of layers that they write: not position tables, class tokens, queries and biases.
_CALLED = re.compile(r"(?:^|_)(?:weight|kernel|filter|matrix|proj|projection|w)s?\d*(?:_|$)|^W(?:_?\w)?$")


def _weights(module: nn.Module, *, asked: bool) -> list[str]:
    """The names of a module's own parameters that are weights. `asked`: the user names the module."""
    if is_norm(module) or (isinstance(module, TABLES) and not asked):
        return []
    known = isinstance(module, (*GATED_TYPES, *KNOWN_TYPES, *TABLES))
    found = []
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        wide = sum(size > 1 for size in parameter.shape) >= 2
        if (asked and not known and wide) or (
            "bias" not in key and (known or (wide and _CALLED.search(key) is not None))
        ):
            found.append(key)
    return found


def hosts_in(module: nn.Module, name: str, *, asked: bool = False) -> list[str]:
    """The names of the hosts that a module's weights have: its own, where a weight is all that it holds beside a bias;
    else that of each weight."""
    if isinstance(module, GATED_TYPES) and (refusal(module) is not None or alone(module)):
        return [name]
    keys = _weights(module, asked=asked)
    if keys == [weight_name(module)] and alone(module):
        return [name]
    return [f"{name}.{key}" if name else key for key in keys]


def _quantised(module: nn.Module) -> bool:
    """True for the linear and convolution layers of torch.ao's eager and graph quantisation."""
    return ".quantized." in f"{type(module).__module__}." and hasattr(module, "_packed_params")


def refusal(module: nn.Module) -> str | None:
    """Why a module that holds weights cannot be gated, or None if it can or holds none."""
    kind = original_class(module).__name__
    if _quantised(module):
        return f"a quantised {kind} holds its weight in a form that no Delta is added to"
    if not isinstance(module, (*GATED_TYPES, *KNOWN_TYPES)):
        return None
    if any(isinstance(hook, (SpectralNorm, WeightNorm)) for hook in module._forward_pre_hooks.values()):
        return f"expected a plain {kind}, got one under weight or spectral norm; remove it first"
    if parametrize.is_parametrized(module):
        return f"expected a plain {kind}, got a parametrised one; remove the parametrisation first"
    weight = module._parameters.get(weight_name(module))
    if weight is not None and (type(weight) is not nn.Parameter or not weight.is_floating_point()):
        got = f"{type(weight.data).__name__} of {weight.dtype}"
        return f"expected a {kind} with a plain floating-point weight, got a {got}"
    if isinstance(module, GATED_TYPES) and weight is None and not _weights(module, asked=False):
        held = [key for key, parameter in module._parameters.items() if parameter is not None]
        return f"expected a {kind} with a parameter {weight_name(module)}, got {held}"
    return None


def globs(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Few patterns that match all of `names` and none of `others`: numbers become stars where that is so."""
    found: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        fits = not any(fnmatch.fnmatchcase(other, pattern) for other in others)
        found[pattern if fits else name] = None
    return list(found)
