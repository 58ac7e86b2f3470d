"""W_t = round(W + g * Delta) of a packed Delta, which is decoded in registers and never a tensor of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import reference
from ..extension import C
from .call import at_once
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
        RuntimeError: tensors that do not fit the weight or each other, before anything is written; on a CPU also a
            bitmap with another number of bits than there are values. A GPU is not waited for to count them: there, bits
            beyond the values stand for zeros.
    """
    watched = weight.requires_grad and torch.is_grad_enabled()
    has_kernels = C is not None and kind in ORDER and weight.device.type in ("cpu", "cuda")
    if not has_kernels or watched or reference.transformed(weight, *tensors.values()):
        opened = _plain(weight, kind, tensors)
        if gate is not None:
            return opened if gate else weight.clone()
        if score is None:
            raise RuntimeError("gate: expected a bool, or a score to read it from, got None for both")
        return torch.where(score >= threshold, opened, weight)
    first, second = (tensors[name] for name in ORDER[kind])
    out = torch.empty_like(weight)
    torch.ops.taps_ext.unpack(out, weight.detach(), first, second, kind, score, gate, threshold)
    return out


# Where a linear layer decodes on its way to the product. That pays at every size that benchmarks/packed.py measures: of
# the time of W_t and torch's product behind it .40 to .97 from 64 x 64 to 128 x 128, .18 to .91 at 1024 x 1024. Smaller
# layers keep W_t for its bits: the product is that of the merged weight then. So does bf16, which these loops widen.
FEW_ROWS, LEAST_WEIGHTS = 16, 1 << 19


def packed_linear(
    input: Tensor, weight: Tensor, kind: str, tensors: Mapping[str, Tensor], bias: Tensor | None
) -> Tensor | None:
    """`input W_t^T + bias` of an open layer without W_t, or None where that is not for these kernels.

    They are for up to 16 rows `[..., K]` on a CPU, K a multiple of 64, in float32, of layers with 2^19 weights or more,
    in eager code without gradients. Sums are in the order of :func:`taps_ext.gated_linear`'s few rows, to whose bits
    with the same Delta the result is equal for scales up to 2^120, the largest that files hold: every element is exact
    then.
    """
    if not at_once() or kind not in ORDER or torch._C._is_any_autocast_enabled() or reference.may_be_transformed():
        return None
    columns = weight.shape[-1]
    rows = input.numel() // columns if columns else 0
    plain = weight.dim() == 2 and weight.device.type == "cpu" and weight.stride(-1) == 1
    types = input.dtype == weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    fits = input.device.type == "cpu" and input.dim() > 0 and input.shape[-1] == columns
    sizes = 0 < rows <= FEW_ROWS and columns % 64 == 0 and weight.numel() >= LEAST_WEIGHTS
    if not (plain and types and fits and sizes):
        return None
    first, second = (tensors[name] for name in ORDER[kind])
    made: Tensor = torch.ops.taps_ext.packed_linear(input, weight, first, second, kind, bias)
    return made


def unpacked(kind: str, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The Delta alone, float32 of a weight's `shape`; arguments and errors as of :func:`packed_weight`."""
    device = next(iter(tensors.values())).device
    # Of the two zeros it is the negative one that gives any other number as it is, a positive zero among them.
    return packed_weight(torch.full(tuple(shape), -0.0, device=device), kind, tensors)


# The codecs that have kernels, and the tensors of each in the operators' order: the codes, then what scales them or
# stands in their places.
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


def _fake_linear(
    input: Tensor, weight: Tensor, codes: Tensor, values: Tensor, codec: str, bias: Tensor | None
) -> Tensor:
    return input.new_empty([*input.shape[:-1], len(weight)])


if C is not None:
    register_fake("unpack", _fake)
    register_fake("packed_linear", _fake_linear)
