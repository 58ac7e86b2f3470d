"""W_t = round(W + g * Delta) of a packed Delta, which is decoded in registers and never a tensor of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import reference
from ..extension import C
from .codec import CODECS
from .fakes import register_fake


def packed_weight(
    weight: Tensor,
    kind: str,
    tensors: Mapping[str, Tensor],
    score: Tensor | None = None,
    *,
    gate: bool | None = True,
    threshold: float = 0.1,
) -> Tensor:
    """W_t as a new tensor like `weight`, differentiable in `weight` alone.

    Args:
        weight: `[N, ...]`, of any floating type; `K` is the product of its other sizes.
        kind: of :data:`taps_ext.ops.codec.CODECS`. tensors: what that codec's layout names, contiguous.
        gate: what the host knows of the gate; None reads it from `score`, on its device.

    Raises:
        RuntimeError: tensors that do not fit the weight or each other (a bitmap with another number of bits than there
            are values), before anything is written.
    """
    first, second = (tensors[name] for name in ORDER[kind])
    watched = weight.requires_grad and torch.is_grad_enabled()
    if C is None or watched or weight.device.type != "cpu" or reference.transformed(weight, first, second):
        opened = _plain(weight, kind, tensors)
        if gate is not None or score is None:
            return opened if gate else weight.clone()
        return torch.where(score >= threshold, opened, weight)
    out = torch.empty_like(weight)
    torch.ops.taps_ext.unpack(out, weight.detach(), first, second, kind, score, gate, threshold)
    return out


def unpacked(kind: str, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The Delta alone, float32 of a weight's `shape`; arguments and errors as of :func:`packed_weight`."""
    device = next(iter(tensors.values())).device
    # Of the two zeros it is the negative one that gives any other number as it is, a positive zero among them.
    return packed_weight(torch.full(tuple(shape), -0.0, device=device), kind, tensors)


# The tensors of each codec in the operator's order: the codes, then what scales them or stands in their places.
ORDER = {"bitmask": ("bitmap", "values"), "int8": ("codes", "scale"), "int4": ("codes", "scale")}
ORDER |= {"sign": ("signs", "scale")}


def _plain(weight: Tensor, kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = CODECS[kind].decode(tensors, len(weight), weight.shape[1:].numel()).view(weight.shape)
    return (weight.to(wide) + delta.to(wide)).to(weight.dtype)


def _fake(
    out: Tensor,
    weight: Tensor,
    codes: Tensor,
    values: Tensor,
    codec: str,
    score: Tensor | None,
    gate: bool | None,
    threshold: float,
) -> None:
    return None


if C is not None:
    register_fake("unpack", _fake)
