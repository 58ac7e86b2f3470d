"""Packed changes: a Delta in fewer bytes, for tasks that are stored and served, and trained no further."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops import codec as codecs
from ..ops.codec import Codec, Layout
from ..ops.unpack import packed_linear, packed_weight, unpacked
from ..store.errors import PackedTensorError
from ..store.record import Record
from .change import Change, register_change
from .gate import Gate
from .host import LINEAR, Op, base_weight
from .sampling import Sample


class Packed(Change):
    """`W_t = W + Delta`, Delta as a codec gives it. Its tensors are the codec's, in the order of W as a row-major
    matrix whatever W's strides; none of them gets a gradient. Only a packed :class:`Layer` has one.
    """

    coded = True
    codec: ClassVar[type[Codec]]

    def _layout(self, weight: Tensor) -> Layout:
        settings = {name: getattr(self, name) for name in self.settings}
        return self.codec.layout(len(weight), weight.shape[1:].numel(), **settings)

    def shapes(self, weight: Tensor) -> dict[str, Sequence[int]]:
        return {name: shape for name, (shape, _) in self._layout(weight).items()}

    def dtypes(self, weight: Tensor) -> dict[str, torch.dtype]:
        return {name: dtype for name, (_, dtype) in self._layout(weight).items()}

    def prove(self, tensors: dict[str, Tensor], weight: Tensor, record: Record) -> None:
        problem = self.codec.problem(tensors, len(weight), weight.shape[1:].numel())
        if problem is not None:
            name, what = problem
            raise record.refuse_tensor(name, f"{self.kind}: {what}", PackedTensorError)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}

    def fold(self, weight: Tensor) -> Tensor:
        return packed_weight(weight, self.kind, self._tensors())

    def weight_over(self, weight: Tensor, gate: Gate) -> Tensor:
        if gate.shut or self.owed or gate.learns or gate.known is not None:
            return super().weight_over(weight, gate)
        return packed_weight(weight, self.kind, self._tensors(), gate.score, gate=None, threshold=gate.threshold)

    def run(
        self,
        op: Op,
        input: Tensor,
        weight: Tensor,
        gate: Gate,
        bias: Tensor | None,
        sample: Sample | None = None,
    ) -> Tensor:
        if gate.known and not self.owed and op is LINEAR:
            made = packed_linear(input, weight, self.kind, self._tensors(), bias)
            if made is not None:
                return made
        return super().run(op, input, weight, gate, bias, sample)

    def added(self, weight: Tensor) -> Tensor | None:
        return unpacked(self.kind, self._tensors(), weight.shape)

    def operations(self, input: Tensor, output: Tensor) -> int:
        return 0  # a sum for each weight, beside a product for each weight and row

    def scratch(self, host: nn.Module, gate: Gate, dtype: torch.dtype, rows: int, *, training: bool) -> int:
        return 0 if self.owed or gate.known is False else base_weight(host).numel() * dtype.itemsize


@register_change("bitmask")
class Bitmask(Packed):
    """Some elements of Delta as they are, all others zero.

    Args:
        kept: how many, from 0 to all.

    Raises:
        ValueError: another number.
    """

    codec = codecs.Bitmask
    settings = ("kept",)

    bitmap: nn.Parameter
    values: nn.Parameter

    def __init__(self, host: nn.Module, *, kept: int, held: bool = True) -> None:
        most = base_weight(host).numel()
        if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept <= most:
            raise ValueError(f"kept: expected an int from 0 to {most}, got {kept!r}")
        self.kept = kept
        super().__init__(host, held=held)

    def start(self, weight: Tensor) -> None:
        """Zeros, in places of which there must be as many as values."""
        chosen = torch.arange(weight.numel(), device=weight.device) < self.kept
        self.bitmap.copy_(codecs.pack_bits(chosen))


@register_change("int8")
class Int8(Packed):
    """Delta in codes of 8 bits, a scale for each 32."""

    codec = codecs.Int8


@register_change("int4")
class Int4(Packed):
    """Delta in codes of 4 bits, a scale for each 32."""

    codec = codecs.Int4


@register_change("sign")
class Sign(Packed):
    """The signs of Delta, and the mean magnitude of each row."""

    codec = codecs.Sign
