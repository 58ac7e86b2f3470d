"""One gated forward for each supported stock layer: linear and 2-d convolution.

`host` owns the base `weight` (and its geometry), `layer` the task's `delta`, `score`, `gate` and `whole` weight;
for the standalone layers both are the same module.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from . import sampling

GATED_TYPES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)  # of the last, the joint input projection


def weight_name(host: nn.Module) -> str:
    """The attribute that holds the weight of a layer that can be gated."""
    return "in_proj_weight" if isinstance(host, nn.MultiheadAttention) else "weight"


def bias_name(host: nn.Module) -> str:
    """The attribute that holds its bias."""
    return "in_proj_bias" if isinstance(host, nn.MultiheadAttention) else "bias"


def base_weight(host: nn.Module) -> Tensor:
    """The base's own weight, whatever task is running."""
    weight = host._parameters[weight_name(host)]
    assert weight is not None
    return weight


def base_bias(host: nn.Module) -> Tensor | None:
    """The base's own bias, whatever task is running."""
    return host._parameters[bias_name(host)]


def resting_weight(holder: nn.Module, weight: Tensor, input: Tensor) -> Tensor:
    """A weight that does not change, in the type it is multiplied in: under autocast it is cast once and kept."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (weight.requires_grad and torch.is_grad_enabled())
    ):
        return weight
    dtype = ops.autocast_dtype(input)
    if dtype is None or dtype == weight.dtype or weight.is_inference():
        return weight
    key = (dtype, weakref.ref(weight.untyped_storage()), weight.storage_offset(), weight._version)
    kept = holder.__dict__.get("_taps_cast")
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():
            kept = holder.__dict__["_taps_cast"] = (key, weight.detach().to(dtype))
    return kept[1]


def _conv2d_input(host: nn.Conv2d, input: Tensor) -> tuple[Tensor, Any]:
    """Pad as the layer's padding mode asks; return the input and the padding left for the convolution."""
    if host.padding_mode == "zeros":
        return input, host.padding
    return F.pad(input, host._reversed_padding_repeated_twice, mode=host.padding_mode), 0


def stock_forward(host: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The stock op of `host` on another weight."""
    if isinstance(host, nn.Linear):
        return F.linear(input, weight, bias)
    assert isinstance(host, nn.Conv2d)
    input, padding = _conv2d_input(host, input)
    return F.conv2d(input, weight, bias, host.stride, padding, host.dilation, host.groups)


def whole_weight(layer: Any) -> Tensor:
    """The layer's whole weight (merged, or the task's own), which requires a gradient only where one may be asked for.

    torch picks the product of some inputs by that flag, and merging must not change a bit.
    """
    whole: Tensor = layer.whole
    return whole if torch.is_grad_enabled() or reference.transformed(whole) else whole.detach()


def gated_forward(
    host: nn.Module,
    layer: Any,
    input: Tensor,
    bias: Tensor | None,
    sample: sampling.Sample | None = None,
    *,
    gate: bool | None,
) -> Tensor:
    """The layer on `W + g * Delta`, whatever is asked of it (`bind.py` has what is usual).

    Args:
        sample: what the score gradient of a closed layer is estimated from; None takes everything.
        gate: as the host knows it.
    """
    if layer.whole is not None:
        return stock_forward(host, input, resting_weight(layer, whole_weight(layer), input), bias)
    weight = base_weight(host)
    if gate is False:
        weight = resting_weight(host, weight, input)
    if layer.delta is None:
        return stock_forward(host, input, weight, bias)
    if isinstance(host, nn.Linear):
        tensors = (input, weight, layer.delta, layer.score, bias)
        return sampling.run(ops.gated_linear, 1, sample, *tensors, gate=gate, threshold=layer.threshold)
    assert isinstance(host, nn.Conv2d)
    input, padding = _conv2d_input(host, input)
    tensors = (input, weight, layer.delta, layer.score, bias)
    geometry = (host.stride, padding, host.dilation, host.groups)
    return sampling.run(ops.gated_conv2d, 3, sample, *tensors, *geometry, gate=gate, threshold=layer.threshold)
