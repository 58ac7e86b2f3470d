"""Bindings: what a task does at one module of the base, settled when something changes and not at every call.

A binding captures settings and the choice of operator, never a tensor: weights, Deltas and scores are read from
`_parameters` at the call, so that `functional_call`, `.to()` and `load_state_dict(assign=True)` stay right. What it is
not made for goes the general road: other code than eager, autocast and transforms before it is asked (`route.py`), a
device gate, sampled gradients and inputs of another type here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..extension import C
from ..ops.call import Settings
from ..ops.conv2d import GatedConv2d, Geometry
from ..ops.linear import GatedLinear
from ..parts import Bound
from .sampling import Sample

Road = Callable[..., Any]


def bind_layer(host: Any, layer: Any) -> Bound:
    """The binding of a gated layer on a stock linear or convolution layer.

    `layer` holds `delta`, `score`, `gate`, `whole` and `threshold`; it may be the host itself.
    """

    def general(host: Any, input: Tensor, sample: Sample | None) -> Tensor:
        hooked = layer._forward_pre_hooks or layer._forward_hooks  # pruning's, for one
        run = layer._general if layer is host else layer if hooked else layer.forward
        made: Tensor = run(host, input, sample)
        return made

    roads = None if layer.gate is None and layer.whole is None else _roads(host, layer, general)
    return roads or (general, general)


def setting_of(layer: Any) -> tuple[Any, ...]:
    """What a layer's arithmetic depends on beside the tensors that autograd watches."""
    watched = layer.score if layer.gate is None else None
    version = None if watched is None or watched.is_inference() else watched._version
    return layer.gate, layer.merged is not None, None if watched is None else id(watched), version


def _whole_of(layer: Any) -> Tensor:
    merged: Tensor | None = layer.merged
    return layer._parameters["weight"] if merged is None else merged


def _roads(host: Any, layer: Any, general: Road) -> Bound | None:
    """What runs without gradients and with them; None where only the general road will do."""
    settings = Settings(layer.gate, layer.threshold, training=True)
    stock: Road
    geometry: tuple[Any, ...]
    behind: tuple[Any, ...]
    if isinstance(host, nn.Linear):
        stock, name, geometry, gated, behind = F.linear, "linear", (), GatedLinear.apply, (settings,)
    elif host.padding_mode == "zeros" and not isinstance(host.padding, str):
        geometry = Geometry(host.stride, host.padding, host.dilation, host.groups)
        stock, name, gated, behind = F.conv2d, "conv2d", GatedConv2d.apply, (geometry, settings)
    else:
        return None
    closed = layer.gate is False
    own_bias = layer is not host and layer.bias is not None

    def base(host: Any, input: Tensor, sample: Sample | None) -> Any:
        held = host._parameters
        return stock(input, held["weight"], layer._parameters["bias"] if own_bias else held["bias"], *geometry)

    def whole(host: Any, input: Tensor, sample: Sample | None) -> Any:
        bias = (layer if own_bias else host)._parameters["bias"]
        return stock(input, _whole_of(layer).detach(), bias, *geometry)

    def whole_with_gradients(host: Any, input: Tensor, sample: Sample | None) -> Any:
        return stock(input, _whole_of(layer), (layer if own_bias else host)._parameters["bias"], *geometry)

    def opened(host: Any, input: Tensor, sample: Sample | None) -> Any:
        own, held = layer._parameters, host._parameters
        bias = own["bias"] if own_bias else held["bias"]
        direct = getattr(C, name)
        made = direct(input, held["weight"], own.get("delta"), own["score"], bias, *geometry, True, False, True)
        return general(host, input, sample) if made is None else made

    def trained(host: Any, input: Tensor, sample: Sample | None) -> Any:
        own, held = layer._parameters, host._parameters
        weight, delta, score = held["weight"], own.get("delta"), own["score"]
        if delta is None or input.dtype != weight.dtype or (closed and sample is not None):
            return general(host, input, sample)
        if not (score if closed else delta).requires_grad and not (input.requires_grad and not closed):
            return base(host, input, sample) if closed else general(host, input, sample)
        return gated(input, weight, delta, score, own["bias"] if own_bias else held["bias"], *behind)

    if layer.whole is not None:
        return whole, whole_with_gradients
    if layer.delta is None or (closed and layer.score is None):
        return base, base
    if C is None:
        return (base if closed else general), general
    return (base if closed else opened), trained
