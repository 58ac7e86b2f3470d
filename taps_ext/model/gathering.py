"""One launch for a model's weights: where launches are what a step pays for, a forward with gradients makes the W_t of
all layers before the base runs, and their gradients become those of Deltas and scores at the end of backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .. import ops, reference
from ..parts import Part
from ..parts.host import base_weight
from ..routing.ready import Ready

Layers = Mapping[str, tuple[Part, nn.Module]]

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
    found = {}
    for name, (part, host) in layers.items():
        gated = part.gathers(host, sampled=sampled)
        if gated is not None:
            found[name] = gated, id(host)
    return found


def gathered(layers: Layers, *, sampled: bool) -> Ready | None:
    """Their W_t; None where there are none to be made together, or this is no such forward."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or reference.may_be_transformed():
        return None
    found = together(layers, sampled=sampled)
    if not found:
        return None
    made = ops.foreach_effective_weight([gated for gated, _ in found.values()])
    return Ready({name: (weight, host) for (name, (_, host)), weight in zip(found.items(), made, strict=True)})
