"""Decoders: what a dense task has in the place of a classifier, and how a task's file describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

_MOST = 1 << 20  # of any size in a description; nothing is allocated for one that tensors do not bear out


class Decoder(nn.Module):
    """Maps `[B, C_i, h_i, w_i]`, finest first, to `[B, out_features, H, W]`.

    A decoder of these kinds is described in a task's file, so that it is loaded without its module being given.

    Args:
        channels: of the maps: `DenseBase.channels`. outputs: classes, or values of each pixel.
    """

    kind: ClassVar[str]

    def __init__(self, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.channels = _sizes("channels", channels)
        self.out_features = _size("outputs", outputs)

    def structure(self) -> dict[str, Any]:
        """What :func:`build` makes such a decoder of, JSON-ready."""
        return {"channels": list(self.channels), "outputs": self.out_features}

    def _checked(self, maps: Sequence[Tensor]) -> None:
        got = [list(one.shape) for one in maps]
        if len(maps) != len(self.channels) or any(
            one.dim() != 4 or one.shape[1] != c for one, c in zip(maps, self.channels, strict=True)
        ):
            raise ConfigError(f"decoder: expected maps [B, C, h, w] of {list(self.channels)} channels, got {got}")


class ConcatDecoder(Decoder):
    """The decoder of MTLoRA (arXiv 2403.20320), the head of HRNet: a 1x1 convolution without bias on each map,
    all at the size of the first, side by side; a 1x1 convolution, batch norm and ReLU; a 1x1 convolution.

    Args:
        widths: of the maps after their convolution; by default 18 and twice as much for each further map. hidden:
            between the last two convolutions; by default four times the widths' sum.
    """

    kind = "concat"

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int,
        widths: Sequence[int] | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__(channels, outputs)
        self.widths = _sizes("widths", [18 << i for i in range(len(self.channels))] if widths is None else widths)
        if len(self.widths) != len(self.channels):
            raise ConfigError(f"widths: expected one for each of {len(self.channels)} maps, got {list(self.widths)}")
        total = sum(self.widths)
        self.hidden = _size("hidden", 4 * total if hidden is None else hidden)
        pairs = zip(self.channels, self.widths, strict=True)
        self.reduce = nn.ModuleList(nn.Conv2d(c, w, 1, bias=False) for c, w in pairs)
        self.mix = nn.Conv2d(total, self.hidden, 1)
        self.norm = nn.BatchNorm2d(self.hidden)
        self.last = nn.Conv2d(self.hidden, self.out_features, 1)

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "widths": list(self.widths), "hidden": self.hidden}

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        self._checked(maps)
        found = [layer(one) for layer, one in zip(self.reduce, maps, strict=True)]
        found = [found[0], *(resized(one, found[0].shape[-2:]) for one in found[1:])]
        mixed = F.relu(self.norm(self.mix(torch.cat(found, 1))))
        return resized(self.last(mixed), size)


class LightDecoder(Decoder):
    """A decoder of few parameters: a 1x1 convolution to `width` on each map, from the coarsest map on added to the next
    finer; a depthwise 3x3 convolution, batch norm and ReLU; a 1x1 convolution."""

    kind = "light"

    def __init__(self, channels: Sequence[int], outputs: int, width: int = 64) -> None:
        super().__init__(channels, outputs)
        self.width = _size("width", width)
        self.reduce = nn.ModuleList(nn.Conv2d(c, self.width, 1, bias=False) for c in self.channels)
        self.smooth = nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width, bias=False)
        self.norm = nn.BatchNorm2d(self.width)
        self.last = nn.Conv2d(self.width, self.out_features, 1)

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "width": self.width}

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        self._checked(maps)
        total: Tensor | None = None
        for layer, one in zip(reversed(list(self.reduce)), reversed(list(maps)), strict=True):
            found = layer(one)
            total = found if total is None else found + resized(total, found.shape[-2:])
        assert total is not None
        return resized(self.last(F.relu(self.norm(self.smooth(total)))), size)


class MapHead(nn.Module):
    """A segmentation head of another library as a decoder: it is called with one map, and its output brought to the
    image's size. torchvision's `DeepLabHead(channels, classes)` and `FCNHead` are such. A file that holds one is loaded
    with `head=`, as with any module of your own.

    Args:
        module: takes `[B, C, h, w]`, gives `[B, n, h, w]`. tap: the place of the map among the taps.
    """

    def __init__(self, module: nn.Module, tap: int = -1) -> None:
        super().__init__()
        self.module, self.tap = module, tap

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return resized(self.module(maps[self.tap]), size)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """`[B, C, h, w]` at another size, bilinear; the same object where it has it."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear")


KINDS: Mapping[str, type[Decoder]] = {one.kind: one for one in (ConcatDecoder, LightDecoder)}


def described(module: nn.Module) -> dict[str, Any] | None:
    """How a file describes a decoder, or None for a module of another class."""
    if not isinstance(module, Decoder) or type(module) not in KINDS.values():
        return None  # a class of the user's may do more
    return {"decoder": module.kind, **module.structure()}


def build(spec: Mapping[str, Any]) -> Decoder:
    """The decoder that a file describes, without memory for its tensors (on the device "meta").

    Raises:
        ConfigError: an unknown kind, or other facts than it has.
    """
    settings = dict(spec)
    kind = settings.pop("decoder", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"decoder: expected one of {sorted(KINDS)}, got {kind!r:.80}")
    try:
        with torch.device("meta"):
            made = KINDS[kind](**settings)
    except TypeError as error:
        raise ConfigError(f"decoder: {error}") from None
    if made.structure() != settings:
        raise ConfigError(f"decoder: expected {sorted(made.structure())}, got {sorted(settings)}")
    return made


def _size(name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= _MOST:
        raise ConfigError(f"{name}: expected an int from 1 to {_MOST}, got {value!r:.80}")
    return value


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 64:
        raise ConfigError(f"{name}: expected a list of 1 to 64 sizes, got {values!r:.80}")
    return tuple(_size(name, value) for value in values)
