"""Feature taps: modules of a backbone whose outputs are features, where they lie in it and how they are laid out."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, suggestion
from . import streams

LAYOUTS = ("nchw", "nhwc", "tokens")
_STRIDES = (4, 8, 16, 32)  # of the maps that decoders are usually given
_STAGES = ("features", "stages", "layers", "trunk_output")  # containers of a network's stages, one after the other
_TOKEN_TAPS = 4  # of a plain transformer, whose blocks are all of one stride


class Tap(NamedTuple):
    """One source of features.

    Attributes:
        name: of the module in the backbone. layout: of its output, "nchw", "nhwc" or "tokens" `[B, prefix + h w, C]`.
        channels: of the map. stride: pixels of the image's height for one row of the map.
        prefix: tokens before those of the image. patch: pixels (down, across) of a token.
    """

    name: str
    layout: str
    channels: int
    stride: int
    prefix: int = 0
    patch: tuple[int, int] = (1, 1)

    def map(self, output: Any, size: tuple[int, int]) -> Tensor:
        """The output of the module as a map `[B, C, h, w]`. `size`: (height, width) of the image.

        Raises:
            ConfigError: the output is no tensor, or not laid out as it was when the backbone was wrapped.
        """
        if not isinstance(output, Tensor):
            raise ConfigError(f"taps: expected {self.name!r} to return a tensor, got {type(output).__name__}")
        if self.layout == "tokens":
            return self._from_tokens(output, size)
        axis = 1 if self.layout == "nchw" else 3
        if output.dim() != 4 or output.shape[axis] != self.channels:
            raise ConfigError(
                f"taps: expected {self.name!r} to return {self.channels} channels as {self.layout}, got "
                f"{list(output.shape)}"
            )
        return output if self.layout == "nchw" else output.permute(0, 3, 1, 2)

    def _from_tokens(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        if output.dim() == 3 and output.shape[2] == self.channels:
            for grid in _grids(size, self.patch):
                if output.shape[1] == self.prefix + grid[0] * grid[1]:
                    return output[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        raise ConfigError(
            f"taps: expected {self.name!r} to return {self.prefix} tokens and one for each {self.patch} pixels of an "
            f"image of {list(size)}, of {self.channels} values, got {list(output.shape)}"
        )


def _grids(size: tuple[int, int], patch: tuple[int, int]) -> list[tuple[int, int]]:
    """Tokens down and across: patches that fit into the image, or those that an image filled up to whole ones has."""
    fit = (size[0] // patch[0], size[1] // patch[1])
    return [fit, (-(-size[0] // patch[0]), -(-size[1] // patch[1]))]


class _Key:
    """Says which wrapper a hook is of: copied with both."""


class _Taking(threading.local):
    """What the forwards of this thread take: by wrapper, outputs by the tap's place."""

    def __init__(self) -> None:
        self.stack: list[tuple[_Key, dict[int, Any], bool]] = []


_taking = _Taking()


class Hook:
    """A forward hook that hands a module's output to the wrapper that runs the backbone in this thread, if one does.

    Args:
        copies: hand a copy, of an output that what runs behind the module changes in place.
    """

    def __init__(self, key: _Key, place: int, name: str, copies: bool) -> None:
        self.key, self.place, self.name, self.copies = key, place, name, copies

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _taking.stack or _taking.stack[-1][0] is not self.key:
            return  # the backbone runs by itself, or is recomputed in backward
        _, taken, gradients = _taking.stack[-1]
        if self.place in taken:
            raise ConfigError(f"taps: expected {self.name!r} to run once in a forward, it ran again")
        if gradients and not torch.is_grad_enabled():
            raise ConfigError(
                f"taps: {self.name!r} runs without gradients, as inside of reentrant checkpointing; checkpoint with "
                "use_reentrant=False, or tap the module that contains what is checkpointed"
            )
        taken[self.place] = streams.copied(output) if self.copies else output


def hooked(backbone: nn.Module, names: Sequence[str], changed: Collection[str] = ()) -> _Key:
    """Put hooks on the modules of these names; returns what :func:`take` knows them by. `changed`: those whose output
    is changed in place later in a forward."""
    key = _Key()
    for place, name in enumerate(names):
        backbone.get_submodule(name).register_forward_hook(Hook(key, place, name, name in changed))
    return key


def take(key: _Key, backbone: nn.Module, names: Sequence[str], inputs: Tensor) -> list[Any]:
    """The outputs of the tapped modules in one forward of the backbone, in the order of `names`.

    Raises:
        ConfigError: a module did not run, naming it.
    """
    taken: dict[int, Any] = {}
    _taking.stack.append((key, taken, torch.is_grad_enabled()))
    try:
        backbone(inputs)
    finally:
        _taking.stack.pop()
    missed = [name for place, name in enumerate(names) if place not in taken]
    if missed:
        raise ConfigError(f"taps: expected the backbone's forward to run {missed[0]!r}, it did not")
    return [taken[place] for place in range(len(names))]


def check_names(backbone: nn.Module, names: Iterable[str]) -> list[str]:
    """The names of taps. Raises ConfigError for none, one twice, and one that the backbone has not."""
    found = [names] if isinstance(names, str) else list(names)
    known = dict(backbone.named_modules())
    if not found:
        raise ConfigError("taps: expected at least one module's name, got none")
    for name in found:
        if not isinstance(name, str) or not name or name not in known:
            hint = suggestion(str(name), known)
            raise ConfigError(f"taps: the backbone has no module {name!r}{hint}")
        if found.count(name) > 1:
            raise ConfigError(f"taps: expected each module once, got {name!r} again")
    return found


def example_of(backbone: nn.Module, image: Sequence[int] | None) -> tuple[int, int, int]:
    """(channels, height, width) of an image that shows how the backbone lays out its features: `image`, or the size
    that a timm model has, or as many channels as its first convolution takes at 224 x 224.

    Raises:
        ConfigError: not three sizes; nothing says how many channels.
    """
    if image is not None:
        sizes = tuple(image)
        if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
            raise ConfigError(f"image: expected (channels, height, width), got {image!r}")
        return sizes
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ConfigError("image: expected (channels, height, width), since the backbone has no convolution, got None")
    side = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if isinstance(side, (tuple, list)) and len(side) == 2:
        return first.in_channels, int(side[0]), int(side[1])
    size = getattr(backbone, "image_size", None)  # torchvision's transformers
    size = size if isinstance(size, int) else 224
    return first.in_channels, size, size


@torch.no_grad()
def outputs_of(
    backbone: nn.Module, names: Sequence[str], image: tuple[int, int, int], changed: set[str] | None = None
) -> list[Any]:
    """What modules return for a grey image, in evaluation mode, which is taken back. A module's last call counts.

    Args:
        changed: is given the names of those whose output is changed in place later (an activation, a sum).
    """
    found: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}
    versions: dict[str, int | None] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found[name] = output
            if isinstance(output, Tensor):
                found[name], kept[name], versions[name] = output.clone(), output, _version(output)

        handles.append(backbone.get_submodule(name).register_forward_hook(keep))
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        for module, _ in modes:
            module.training = False
        backbone(example_image(backbone, image))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if changed is not None:
        changed |= {
            name for name, output in kept.items() if (told := versions[name]) is None or told != output._version
        }
    return [found.get(name) for name in names]


def _version(output: Tensor) -> int | None:
    """A number that grows with each change in place; None where none is kept."""
    return None if output.is_inference() else output._version


def example_image(backbone: nn.Module, image: tuple[int, int, int]) -> Tensor:
    """One grey image where the backbone is, of its type."""
    like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.zeros(0))
    return torch.full((1, *image), 0.5, dtype=like.dtype, device=like.device)


def tap_of(backbone: nn.Module, name: str, output: Any, image: tuple[int, int, int], layout: str | None) -> Tap:
    """A tap by what its module returned for one image.

    Raises:
        ConfigError: no tensor of features, or one that is laid out in several possible ways and no `layout` says which.
    """
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"taps: expected {name!r} to return features [B, C, h, w], [B, h, w, C] or [B, n, C], got {got}"
        )
    if output.dim() == 3:
        return _token_tap(backbone, name, output, image)
    _, a, b, c = output.shape
    height, width = image[1:]
    possible = [one for one, (h, w) in (("nchw", (b, c)), ("nhwc", (a, b))) if _stride(h, w, height, width)]
    if layout is None and len(possible) != 1:
        raise ConfigError(
            f"layouts: expected 'nchw' or 'nhwc' for {name!r}, whose output {list(output.shape)} for an image of "
            f"{[height, width]} says nothing; or another image"
        )
    layout = possible[0] if layout is None else layout
    channels, rows, columns = (a, b, c) if layout == "nchw" else (c, a, b)
    return Tap(name, layout, channels, _stride(rows, columns, height, width) or max(1, round(height / rows)))


def _stride(rows: int, columns: int, height: int, width: int) -> int | None:
    """By how much an image of height x width is made smaller in a map of rows x columns, each side rounded up or down:
    by a power of two where one gives that (of 120 pixels 8 rows are 16 each, not 15). None where nothing does."""
    for stride in (2**power for power in range(8)):
        if abs(height / stride - rows) < 1 and abs(width / stride - columns) < 1:
            return stride
    stride = max(1, round(height / rows))
    return stride if abs(height / stride - rows) <= 1 and abs(width / stride - columns) <= 1 else None


def _token_tap(backbone: nn.Module, name: str, output: Tensor, image: tuple[int, int, int]) -> Tap:
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", getattr(backbone, "patch_size", None))
    sizes = (patch, patch) if isinstance(patch, int) else patch
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise ConfigError(f"taps: {name!r} returns tokens {list(output.shape)}, and the backbone has no patch_size")
    down, across = int(sizes[0]), int(sizes[1])
    tokens = output.shape[1]
    for grid in _grids((image[1], image[2]), (down, across)):
        prefix = tokens - grid[0] * grid[1]
        told = getattr(backbone, "num_prefix_tokens", prefix)
        if 0 <= prefix <= 16 and prefix == told:  # class, distillation and register tokens
            return Tap(name, "tokens", output.shape[2], down, prefix, (down, across))
    raise ConfigError(
        f"taps: expected {name!r} to return one token for each {down} x {across} pixels of an image of "
        f"{list(image[1:])}, behind a few others, got {tokens}"
    )


def find_taps(backbone: nn.Module, image: Sequence[int] | None = None) -> list[str]:
    """The names of modules whose outputs are usual features of a timm or torchvision model, finest first.

    Of timm what its `feature_info` names, one module for each stride from 4 on; of a plain transformer four blocks
    evenly, the last one after its norm. Of others the last module at each stride in a container of stages (`features`,
    `stages`, `layers`, `layer1` to `layer4`).

    Args:
        image: (channels, height, width), where the model does not say (see :class:`DenseBase`).

    Raises:
        ConfigError: none are known for such a model.
    """
    told: Any = getattr(backbone, "feature_info", None)
    infos = told.get_dicts() if hasattr(told, "get_dicts") else told
    known = dict(backbone.named_modules())
    if isinstance(infos, list) and infos and all(isinstance(one, dict) and one.get("module") in known for one in infos):
        return _of_strides([(one["module"], int(one["reduction"])) for one in infos], known)
    blocks = [name for name in known if name.rpartition(".")[0] == "encoder.layers"]
    if blocks:  # torchvision's ViT
        return _evenly(blocks, "encoder.ln" if "encoder.ln" in known else None)
    for container in _STAGES:
        if isinstance(known.get(container), nn.Sequential):
            names = [f"{container}.{name}" for name, _ in known[container].named_children()]
            return _by_running(backbone, names, image)
    names = [name for name in known if "." not in name and name[:5] == "layer" and name[5:].isdigit()]
    if not names:
        raise ConfigError(
            f"taps: none are known for a {type(backbone).__name__}; name modules whose outputs are features, "
            f"of {[name for name, _ in backbone.named_children()]}"
        )
    return _by_running(backbone, names, image)


def _by_running(backbone: nn.Module, names: list[str], image: Sequence[int] | None) -> list[str]:
    example = example_of(backbone, image)
    strides = []
    for name, output in zip(names, outputs_of(backbone, names, example), strict=True):
        if isinstance(output, Tensor) and output.dim() == 4:
            strides.append((name, tap_of(backbone, name, output, example, None).stride))
    if not strides:
        raise ConfigError(f"taps: none of {names} returns a map of features; name modules that do")
    return _of_strides(strides, dict(backbone.named_modules()))


def _of_strides(found: list[tuple[str, int]], known: dict[str, nn.Module]) -> list[str]:
    """The last module of each stride, from 4 on where there are several such."""
    if len({stride for _, stride in found}) == 1 and len(found) > 1:
        norm = known.get("norm")
        return _evenly(
            [name for name, _ in found], "norm" if norm is not None and any(True for _ in norm.parameters()) else None
        )
    last = {stride: name for name, stride in found}
    coarse = {stride: name for stride, name in last.items() if stride in _STRIDES}
    return [name for _, name in sorted((coarse if len(coarse) > 1 else last).items())]


def _evenly(blocks: list[str], norm: str | None) -> list[str]:
    """Some of a plain transformer's blocks, the last one (or the norm behind it) among them."""
    count = min(_TOKEN_TAPS, len(blocks))
    chosen = [blocks[(len(blocks) * (one + 1)) // count - 1] for one in range(count)]
    return chosen if norm is None else [*chosen[:-1], norm]
