"""One launch for a model's weights: where launches are what a step pays for, a forward with gradients makes the W_t of
all layers before the base runs, and their gradients become those of Deltas and scores at the end of backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..parts import Part
from ..parts.bind import Made, Road
from ..parts.host import base_weight
from ..routing.frame import Placed
from ..routing.ready import Ready

Layers = Mapping[str, tuple[Part, nn.Module, Made | None]]

# For tests and measurements: None leaves it to the device.
forced: bool | None = None


def _pays(host: nn.Module) -> bool:
    """On a GPU a rebuild is mostly its launch. On a CPU it is memory traffic, which is the same layer by layer, and one
    workspace serves all layers there, in place of a W_t that is kept for each."""
    if forced is not None or ops._C is None:
        return bool(forced)
    return ops._C.twin or base_weight(host).device.type == "cuda"


def together(layers: Layers, *, sampled: bool) -> dict[str, tuple[ops.Gated, int]]:
    """Those of these layers whose W_t are made together in a forward with gradients, with the `id` of their modules.

    `sampled`: closed layers learn from a part of the batch, and make their own.
    """
    if not layers or not _pays(next(iter(layers.values()))[1]):
        return {}
    casts = torch._C._is_any_autocast_enabled()
    found = {}
    for name, (part, host, _) in layers.items():
        dtype = ops.autocast_dtype(base_weight(host)) if casts else None
        gated = part.gathers(host, sampled=sampled, dtype=dtype)
        if gated is not None:
            found[name] = gated, id(host)
    return found


def gathered(
    layers: Layers, bound: Mapping[str, Placed], *, sampled: bool
) -> tuple[Ready | None, Mapping[str, Placed]]:
    """Their W_t, and bindings that use them; None where none are to be made together, or this is no such forward."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or reference.may_be_transformed():
        return None, bound
    found = together(layers, sampled=sampled)
    if not found:
        return None, bound
    made, own = {}, dict(bound)
    by_device: dict[torch.device, list[str]] = {}  # a node of backward runs on one
    for name, (gated, _) in found.items():
        by_device.setdefault(gated.weight.device, []).append(name)
    for names in by_device.values():
        weights = ops.foreach_effective_weight([found[name][0] for name in names])
        for name, weight in zip(names, weights, strict=True):
            gated, host = found[name]
            made[name] = weight, gated, host
            before, road = own.pop(name, None), layers[name][2]
            if before is not None and road is not None:
                own[name] = (before[0][0], _with(road, weight)), host
    return Ready(made, own), own


def _with(road: Made, weight: Tensor) -> Road:
    return lambda host, input, sample: road(host, input, weight)
