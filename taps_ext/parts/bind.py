"""Bindings: what a task does at one module of the base, settled when something changes and not at every call.

A binding captures settings and the choice of operator, never a tensor: weights, Deltas and scores are read from
`_parameters` at the call, so that `functional_call`, `.to()` and `load_state_dict(assign=True)` stay right. What it is
not made for goes the general road: other code than eager, autocast and transforms before it is asked (`routing`), a
device gate, sampled gradients and inputs of another type here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extension import C
from ..ops.call import Settings
from ..ops.conv2d import GatedConv2d, Geometry, gated_conv2d, two
from ..ops.linear import GatedLinear, gated_linear
from .gate import Gate
from .sampling import Sample

Road = Callable[..., Any]
Bound = tuple[Road, Road]
Made = Callable[[nn.Module, Tensor, Tensor], Any]


def _stock(host: Any) -> tuple[Road, tuple[Any, ...]] | None:
    """torch's product of a host and what it takes behind the bias; None where the input is padded first."""
    if isinstance(host, nn.Linear):
        return F.linear, ()
    if host.padding_mode == "zeros" and not isinstance(host.padding, str):
        return F.conv2d, Geometry(two(host.stride), two(host.padding), two(host.dilation), host.groups)
    return None


# What is not among a module's parameters any more was pruned or parametrised since: the general road finds it.


def base(host: nn.Module, bias_of: Any, general: Road) -> Bound | None:
    """The stock product on the base's weight. `bias_of`: whose the bias is, if it is not the host's."""
    known = _stock(host)
    if known is None:
        return None
    stock, geometry = known

    def run(host: Any, input: Tensor, sample: Sample | None) -> Any:
        try:
            weight, bias = host._parameters["weight"], (bias_of or host)._parameters["bias"]
            return stock(input, weight, bias, *geometry)
        except (KeyError, RuntimeError, TypeError):
            pass
        return general(host, input, sample)  # says what is wrong as an open layer does, or casts a bias as it does

    return run, run


def whole(host: nn.Module, weight_of: Callable[[], Tensor], bias_of: Any, general: Road) -> Bound | None:
    """The stock product on another weight, which `weight_of` finds; it may raise KeyError."""
    known = _stock(host)
    if known is None:
        return None
    stock, geometry = known

    def without(host: Any, input: Tensor, sample: Sample | None) -> Any:
        try:
            weight, bias = weight_of(), (bias_of or host)._parameters["bias"]
        except KeyError:
            return general(host, input, sample)
        return stock(input, weight.detach(), bias, *geometry)

    def with_gradients(host: Any, input: Tensor, sample: Sample | None) -> Any:
        try:
            weight, bias = weight_of(), (bias_of or host)._parameters["bias"]
        except KeyError:
            return general(host, input, sample)
        return stock(input, weight, bias, *geometry)

    return without, with_gradients


def made(host: nn.Module, bias_of: Any, general: Road) -> Made | None:
    """The stock product on a W_t that is there already, as (host, input, W_t)."""
    known = _stock(host)
    if known is None:
        return None
    stock, geometry = known

    def run(host: Any, input: Tensor, weight: Tensor) -> Any:
        try:
            if input.dtype == weight.dtype:
                return stock(input, weight, (bias_of or host)._parameters["bias"], *geometry)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError):
            pass
        return general(host, input, None)  # says what is wrong as it does by itself

    return run


def dense(host: nn.Module, gate: Gate, change: Any, bias_of: Any, general: Road) -> Bound | None:
    """W + g * Delta by our operators. `change` holds `delta`; `gate` is one that the host knows."""
    known, roads = _stock(host), base(host, bias_of, general)
    if known is None or roads is None:
        return None
    geometry = known[1]
    closed = gate.known is False
    settings = Settings(gate.known, gate.threshold, training=True)
    name: str = "linear" if isinstance(host, nn.Linear) else "conv2d"
    operator: Road = gated_linear if geometry == () else gated_conv2d
    gated, behind = (GatedLinear.apply, (settings,)) if geometry == () else (GatedConv2d.apply, (geometry, settings))

    def opened(host: Any, input: Tensor, sample: Sample | None) -> Any:
        held = host._parameters
        try:
            weight, delta, score = held["weight"], change._parameters["delta"], gate._parameters["score"]
            bias = (bias_of or host)._parameters["bias"]
        except KeyError:
            return general(host, input, sample)
        made = getattr(C, name)(input, weight, delta, score, bias, *geometry, True, False, True)
        if made is None:  # the plain function is not enough: the operator, with the tensors at hand
            return operator(input, weight, delta, score, bias, *geometry, gate=True, threshold=gate.threshold)
        return made

    def trained(host: Any, input: Tensor, sample: Sample | None) -> Any:
        held = host._parameters
        try:
            weight, delta, score = held["weight"], change._parameters["delta"], gate._parameters["score"]
            learned: Any = score if closed else delta
            bias = (bias_of or host)._parameters["bias"]
            usual = input.dtype == weight.dtype and delta is not None
        except (KeyError, AttributeError):  # an input that is no tensor, too
            usual = False
        if not usual or (closed and sample is not None):
            return general(host, input, sample)
        if not learned.requires_grad and not (input.requires_grad and not closed):
            return roads[1](host, input, sample) if closed else general(host, input, sample)
        return gated(input, weight, delta, score, bias, *behind)

    if C is None:
        return (roads[0] if closed else general), general
    return (roads[0] if closed else opened), trained
