"""What a codec makes of a Delta: by kernels on the CPU, in plain torch elsewhere, the same to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..extension import C
from .codec import CODECS, Bitmask, Grouped
from .fakes import register_fake
from .unpack import ORDER


def encoded(kind: str, delta: Tensor, share: float | None = None) -> dict[str, Tensor]:
    """The tensors of a codec's layout.

    Args:
        kind: of :data:`taps_ext.ops.codec.CODECS`.
        delta: float32 `[rows, columns]`, contiguous, of finite values.
        share: of a bitmask, in (0, 1]: so much of all elements, those of the largest magnitudes, of equal ones the
            first. None: all but positive zeros, so that nothing is lost.

    Raises:
        ValueError: values that no scale of the codec reaches.
    """
    codec = CODECS[kind]
    if issubclass(codec, Grouped):
        codec.check(delta)
    if C is None or kind not in ORDER or delta.device.type != "cpu" or reference.transformed(delta):
        return codec.encode(delta, share) if codec is Bitmask else codec.encode(delta)
    settings = {}
    if codec is Bitmask:
        settings["kept"] = int(torch.count_nonzero(delta if share is not None else delta.view(torch.int32)))
        if share is not None:
            settings["kept"] = min(settings["kept"], codec.count(share, delta.numel()))
    layout = codec.layout(*delta.shape, **settings)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
    torch.ops.taps_ext.encode(delta.detach(), *(tensors[name] for name in ORDER[kind]), kind)
    return tensors


def _fake(delta: Tensor, codes: Tensor, values: Tensor, codec: str) -> None:
    return None


if C is not None:
    register_fake("encode", _fake)
